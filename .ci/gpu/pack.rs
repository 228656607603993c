//! A folder as one small file, and back, on machines that may have neither tar nor a compressor.
//!
//! Programs that share a library hold the same kernels, a few MiB each. So files are cut where their content says (a hash of the last
//! bytes), equal pieces are kept once, and each is deflated.
//!
//! The file, in little-endian numbers: `MAGIC`; a u32 with the number of pieces, and for each a u32 of its bytes here, then these; a u32
//! with the number of files, and for each a u16 with the bytes of its path, the path, a u8 that is 1 for a program, a u32 with the number of its
//! pieces, and a u32 for each.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;

const MAGIC: &[u8] = b"moe-pack 1\n";

/// A piece ends where this many low bits of the hash are zero: 32 KiB on average.
const CUT_BITS: u32 = 15;
const LEAST: usize = 4 << 10;
const MOST: usize = 256 << 10;

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

/// Ends of the pieces of `bytes`: where they lie follows from what stands before them alone, so that the same content is cut the same way
/// wherever it stands.
fn cuts(bytes: &[u8]) -> Vec<usize> {
    // Shifted out after 32 bytes, as the hash has 32 bits.
    let weight = |byte: u8| u32::from(byte).wrapping_add(1).wrapping_mul(0x9E37_79B1).rotate_left(u32::from(byte) & 31);
    let (mut ends, mut start, mut hash) = (Vec::new(), 0, 0u32);
    for (at, &byte) in bytes.iter().enumerate() {
        hash = (hash << 1).wrapping_add(weight(byte));
        let len = at + 1 - start;
        if (len >= LEAST && hash >> (32 - CUT_BITS) == 0) || len == MOST {
            ends.push(at + 1);
            start = at + 1;
        }
    }
    if start < bytes.len() {
        ends.push(bytes.len());
    }
    ends
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
    let (mut pieces, mut numbers, mut listing) = (Vec::new(), HashMap::<Vec<u8>, u32>::new(), Vec::new());
    let files = files(folder)?;
    for (name, path) in &files {
        let bytes = fs::read(path)?;
        listing.extend(u16::try_from(name.len())?.to_le_bytes());
        listing.extend(name.as_bytes());
        listing.push(is_program(path)?.into());
        let ends = cuts(&bytes);
        listing.extend(u32::try_from(ends.len())?.to_le_bytes());
        let mut start = 0;
        for end in ends {
            let piece = &bytes[start..end];
            let next = u32::try_from(numbers.len())?;
            let number = *numbers.entry(piece.to_vec()).or_insert(next);
            if number == next {
                let mut deflated = ZlibEncoder::new(Vec::new(), Compression::best());
                deflated.write_all(piece)?;
                let deflated = deflated.finish()?;
                pieces.extend(u32::try_from(deflated.len())?.to_le_bytes());
                pieces.extend(deflated);
            }
            listing.extend(number.to_le_bytes());
            start = end;
        }
    }
    let counts = [numbers.len(), files.len()].map(u32::try_from);
    let [pieces_count, files_count] = counts;
    Ok([MAGIC, &pieces_count?.to_le_bytes(), &pieces, &files_count?.to_le_bytes(), &listing].concat())
}

/// What is left of a packed file.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or("the packed file is cut short")?;
        self.0 = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes(4)?.try_into()?))
    }
}

fn unpack(packed: &[u8], folder: &Path) -> Result<()> {
    let mut rest = Rest(packed);
    if rest.bytes(MAGIC.len())? != MAGIC {
        return Err("not a packed file of this version".into());
    }
    let mut pieces = Vec::new();
    for _ in 0..rest.number()? {
        let len = rest.number()? as usize;
        let mut piece = Vec::new();
        ZlibDecoder::new(rest.bytes(len)?).read_to_end(&mut piece)?;
        pieces.push(piece);
    }
    for _ in 0..rest.number()? {
        let len = u16::from_le_bytes(rest.bytes(2)?.try_into()?);
        let name = std::str::from_utf8(rest.bytes(len.into())?)?;
        if Path::new(name).components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
            return Err(format!("{name} leads out of the folder").into());
        }
        let program = rest.bytes(1)? == [1];
        let mut content = Vec::new();
        for _ in 0..rest.number()? {
            content.extend(pieces.get(rest.number()? as usize).ok_or("a piece is missing")?);
        }
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap_or(folder))?;
        fs::write(&path, content).map_err(|error| format!("{}: {error}", path.display()))?;
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
        let contents = [("a", noise(1000, 1)), ("inner/b", noise(77_777, 2)), ("inner/empty", Vec::new())];
        for (name, own) in &contents {
            let content = if own.is_empty() { Vec::new() } else { [own.clone(), shared.clone(), own.clone()].concat() };
            fs::write(from.path().join(name), content).unwrap();
        }
        let packed = pack(from.path()).unwrap();
        assert!(packed.len() < 5 << 19, "{} bytes: the shared 2 MiB are there more than once", packed.len());
        unpack(&packed, to.path()).unwrap();
        for (name, _) in &contents {
            assert!(fs::read(from.path().join(name)).unwrap() == fs::read(to.path().join(name)).unwrap(), "{name}");
        }
        assert!(unpack(&packed[..packed.len() - 1], to.path()).unwrap_err().to_string().contains("cut short"));
    }
}
