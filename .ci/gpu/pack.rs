//! A folder as one small file, and back, on machines that may have neither tar nor a compressor.
//!
//! Programs that share libraries hold much the same code and kernels, at unlike places and further apart than deflate sees. So what stood
//! anywhere before becomes a copy first (as Tridgell's rzip does it), and the rest is deflated.
//!
//! The file: `MAGIC`, then, deflated, three parts, each behind its length, all numbers being of 7 bits a byte, the lowest first, with 128 added
//! to all but the last. The listing: of each file the length of its path, the path, 1 for a program or 0, its length. The steps that make all
//! contents, one behind the other: so many literal bytes, then so many bytes copied, from so far back. The literal bytes.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;

const MAGIC: &[u8] = b"moe-pack 1\n";

/// Bytes that are looked up, and the fewest that are copied: a step takes about 8 bytes, deflated literals about half of theirs.
const LOOKED_UP: usize = 16;
const LEAST_COPY: usize = 20;
const TABLE_BITS: u32 = 22;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let done = match &arguments[..] {
        [verb, file, folder] if verb.as_os_str() == "pack" => {
            pack(folder).and_then(|packed| Ok(fs::write(file, packed)?))
        }
        [verb, file, folder] if verb.as_os_str() == "unpack" => {
            fs::read(file).map_err(Into::into).and_then(|packed| unpack(&packed, folder))
        }
        _ => Err("usage: gpu_pack pack|unpack FILE FOLDER".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gpu_pack: {error}");
            ExitCode::FAILURE
        }
    }
}

fn put(out: &mut Vec<u8>, mut number: usize) {
    while number >= 128 {
        out.push(number as u8 | 128);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Every file below `folder`, by its path from there, sorted.
fn files(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).map_err(|error| format!("{}: {error}", next.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder)?.to_str().ok_or("a name is not UTF-8")?.to_owned();
                found.push((name, path));
            }
        }
    }
    found.sort();
    Ok(found)
}

fn is_program(path: &Path) -> Result<bool> {
    #[cfg(unix)]
    return Ok(std::os::unix::fs::PermissionsExt::mode(&fs::metadata(path)?.permissions()) & 0o100 != 0);
    #[cfg(not(unix))]
    Ok(path.extension().is_some_and(|extension| extension == "exe"))
}

fn pack(folder: &Path) -> Result<Vec<u8>> {
    let (mut listing, mut all) = (Vec::new(), Vec::new());
    for (name, path) in files(folder)? {
        let bytes = fs::read(&path)?;
        put(&mut listing, name.len());
        listing.extend(name.as_bytes());
        put(&mut listing, is_program(&path)?.into());
        put(&mut listing, bytes.len());
        all.extend(bytes);
    }
    let (steps, literals) = steps(&all);
    let mut packed = MAGIC.to_vec();
    let mut deflated = ZlibEncoder::new(&mut packed, Compression::best());
    for part in [listing, steps, literals] {
        let mut length = Vec::new();
        put(&mut length, part.len());
        deflated.write_all(&length)?;
        deflated.write_all(&part)?;
    }
    deflated.finish()?;
    Ok(packed)
}

/// Steps and literals that make `all`.
fn steps(all: &[u8]) -> (Vec<u8>, Vec<u8>) {
    // Where bytes of this hash stood last, plus one.
    let mut table = vec![0u32; 1 << TABLE_BITS];
    let (mut steps, mut literals) = (Vec::new(), Vec::new());
    let (mut at, mut literal) = (0, 0);
    while at + LOOKED_UP <= all.len() {
        let half = |from: usize| u64::from_le_bytes(all[from..][..8].try_into().expect("8 bytes"));
        let mixed = (half(at).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ half(at + 8)).wrapping_mul(0xC2B2_AE3D_27D4_EB4F);
        let place = &mut table[(mixed >> (64 - TABLE_BITS)) as usize];
        let before = std::mem::replace(place, at as u32 + 1) as usize;
        if before == 0 {
            at += 1;
            continue;
        }
        let before = before - 1;
        let same = |back: usize| all[before - back - 1] == all[at - back - 1];
        let back = (0..before.min(at - literal)).take_while(|&back| same(back)).count();
        let ahead = all[before..].iter().zip(&all[at..]).take_while(|(a, b)| a == b).count();
        if back + ahead < LEAST_COPY {
            at += 1;
            continue;
        }
        let start = at - back;
        put(&mut steps, start - literal);
        put(&mut steps, back + ahead);
        put(&mut steps, at - before);
        literals.extend(&all[literal..start]);
        at += ahead;
        literal = at;
    }
    put(&mut steps, all.len() - literal);
    literals.extend(&all[literal..]);
    (steps, literals)
}

/// What is left of a packed file.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or("the packed file is cut short")?;
        self.0 = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<usize> {
        let mut number = 0;
        for shift in (0..usize::BITS).step_by(7) {
            let byte = self.bytes(1)?[0];
            number |= usize::from(byte & 127) << shift;
            if byte < 128 {
                return Ok(number);
            }
        }
        Err("the packed file has a number without end".into())
    }

    fn part(&mut self) -> Result<Rest<'a>> {
        let len = self.number()?;
        Ok(Rest(self.bytes(len)?))
    }
}

fn unpack(packed: &[u8], folder: &Path) -> Result<()> {
    let deflated = packed.strip_prefix(MAGIC).ok_or("not a packed file of this version")?;
    let mut whole = Vec::new();
    ZlibDecoder::new(deflated).read_to_end(&mut whole).map_err(|_| "the packed file is cut short")?;
    let mut whole = Rest(&whole);
    let [mut listing, mut steps, mut literals] = [whole.part()?, whole.part()?, whole.part()?];
    let mut all: Vec<u8> = Vec::new();
    loop {
        let literal = steps.number()?;
        all.extend(literals.bytes(literal)?);
        if steps.0.is_empty() {
            break;
        }
        let (len, far) = (steps.number()?, steps.number()?);
        let from = all.len().checked_sub(far).filter(|_| far > 0).ok_or("a copy from before the beginning")?;
        // A copy may reach into itself.
        let mut left = len;
        while left > 0 {
            let now = left.min(all.len() - from);
            all.extend_from_within(from..from + now);
            left -= now;
        }
    }
    let mut all = Rest(&all);
    while !listing.0.is_empty() {
        let name = listing.part()?.0;
        let name = std::str::from_utf8(name)?;
        if Path::new(name).components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
            return Err(format!("{name} leads out of the folder").into());
        }
        let program = listing.number()? == 1;
        let len = listing.number()?;
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap_or(folder))?;
        fs::write(&path, all.bytes(len)?).map_err(|error| format!("{}: {error}", path.display()))?;
        #[cfg(unix)]
        if program {
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that no compressor makes smaller.
    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut rng = fastrand::Rng::with_seed(seed);
        (0..len).map(|_| rng.u8(..)).collect()
    }

    #[test]
    fn files_come_back_and_what_they_share_is_kept_once() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let shared = noise(2 << 20, 0);
        fs::create_dir(from.path().join("inner")).unwrap();
        // The shared part stands at unlike places.
        let runs = [vec![7; 100_000], b"abc".repeat(9999)].concat();
        let contents =
            [("a", noise(1000, 1)), ("inner/b", noise(77_777, 2)), ("inner/empty", Vec::new()), ("runs", runs)];
        for (name, own) in &contents {
            let content = if own.is_empty() { Vec::new() } else { [own.clone(), shared.clone(), own.clone()].concat() };
            fs::write(from.path().join(name), content).unwrap();
        }
        let packed = pack(from.path()).unwrap();
        assert!(packed.len() < 9 << 18, "{} bytes: the shared 2 MiB are there more than once", packed.len());
        unpack(&packed, to.path()).unwrap();
        for (name, _) in &contents {
            assert!(fs::read(from.path().join(name)).unwrap() == fs::read(to.path().join(name)).unwrap(), "{name}");
        }
        assert!(unpack(&packed[..packed.len() - 1], to.path()).unwrap_err().to_string().contains("cut short"));
    }
}
