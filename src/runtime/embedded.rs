//! The kernels that the build rendered, as text and as machine code, deflated: a binary holds them all, and needs few.

use std::io::Read;

#[path = "../../kernels/later.rs"]
mod later;

/// One kernel variant: the PTX that the driver can compile for any later GPU, and machine code where the build had `ptxas`.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Embedded {
    /// Name of the variant, of its PTX entry and of its tests.
    pub name: &'static str,
    ptx: &'static [u8],
    /// Machine code by architecture; empty where the build found no `ptxas`.
    pub images: &'static [Image],
}

/// A kernel as `ptxas` assembled it for one architecture.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Image {
    /// Architecture, such as `sm_80`.
    pub arch: &'static str,
    cubin: &'static [u8],
    /// Registers of a thread.
    pub registers: u32,
    /// Static shared memory in bytes.
    pub shared_bytes: u32,
}

impl Embedded {
    /// The module's PTX text.
    pub fn ptx(&self) -> String {
        String::from_utf8(inflated(self.ptx)).expect("the build rendered UTF-8")
    }

    /// The text for a device of this compute capability: from 9.0 on some kernels wait themselves for the launch in front of them.
    pub fn ptx_for(&self, capability: (u32, u32)) -> String {
        let text = self.ptx();
        let later = if capability >= (9, 0) { later::for_sm_90(&text) } else { None };
        later.unwrap_or(text)
    }

    /// The machine code that a device of this compute capability runs: of architecture-specific code (`sm_90a`) what was made for exactly
    /// this device; else of its major version and the highest minor version that is not above its own. The first is preferred.
    pub fn image_for(&self, capability: (u32, u32)) -> Option<&'static Image> {
        self.images
            .iter()
            .filter_map(|image| Some((image.rank(capability)?, image)))
            .max_by_key(|(rank, _)| *rank)
            .map(|(_, image)| image)
    }
}

impl Image {
    /// ELF image.
    pub fn cubin(&self) -> Vec<u8> {
        inflated(self.cubin)
    }

    /// How well it fits a device: whether it is specific to it, then its minor version; none where the device does not run it.
    fn rank(&self, (major, minor): (u32, u32)) -> Option<(bool, u32)> {
        let name = self.arch.strip_prefix("sm_")?;
        let digits = name.trim_end_matches(|c: char| c.is_ascii_lowercase());
        let number: u32 = digits.parse().ok()?;
        let (of_major, of_minor) = (number / 10, number % 10);
        let fits = match &name[digits.len()..] {
            "" => of_major == major && of_minor <= minor,
            "a" => (of_major, of_minor) == (major, minor),
            "f" => of_major == major && of_minor <= minor,
            _ => false,
        };
        fits.then_some((digits.len() < name.len(), of_minor))
    }
}

fn inflated(bytes: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    flate2::read::ZlibDecoder::new(bytes).read_to_end(&mut plain).expect("the build deflated it");
    plain
}

static TABLE: &[Embedded] = include!(concat!(env!("OUT_DIR"), "/embedded_table.rs"));

/// All embedded kernels, in the order of the registry.
pub fn embedded() -> &'static [Embedded] {
    TABLE
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn image(arch: &'static str) -> Image {
        Image { arch, cubin: &[], registers: 0, shared_bytes: 0 }
    }

    #[test]
    fn later_devices_have_lines_of_their_own() {
        let waits = |text: &str| text.lines().any(|line| line.trim_start().starts_with("griddepcontrol.wait"));
        let mut some = 0;
        for entry in embedded() {
            let [before, after] = [(8, 9), (9, 0)].map(|capability| entry.ptx_for(capability));
            some += usize::from(before != after);
            assert!(!waits(&before), "{}", entry.name);
            assert_eq!(waits(&after), before != after, "{}", entry.name);
        }
        assert!(some > 0);
    }

    #[test]
    fn images_go_to_the_devices_that_run_them() {
        static IMAGES: [Image; 6] =
            [image("sm_80"), image("sm_86"), image("sm_90"), image("sm_90a"), image("sm_100a"), image("sm_120")];
        let entry = Embedded { name: "test", ptx: &[], images: &IMAGES };
        let chosen = |capability| entry.image_for(capability).map(|image| image.arch);
        assert_eq!(chosen((8, 0)), Some("sm_80"));
        assert_eq!(chosen((8, 6)), Some("sm_86"));
        assert_eq!(chosen((8, 9)), Some("sm_86"));
        assert_eq!(chosen((9, 0)), Some("sm_90a"));
        assert_eq!(chosen((10, 0)), Some("sm_100a"));
        assert_eq!(chosen((10, 3)), None, "sm_100a runs on nothing but 10.0");
        assert_eq!(chosen((12, 1)), Some("sm_120"));
        assert_eq!(chosen((7, 5)), None);
    }

    #[test]
    fn all_kernels_fit_into_four_mebibytes() {
        let images = |entry: &Embedded| entry.images.iter().map(|image| image.cubin.len()).sum::<usize>();
        let ptx: usize = TABLE.iter().map(|entry| entry.ptx.len()).sum();
        assert!(ptx <= 4 << 20, "{ptx} bytes of PTX");
        // A build without ptxas has none; one for many architectures has more, which is its user's choice.
        let archs = TABLE.iter().map(|entry| entry.images.len()).max().unwrap_or(0);
        let code: usize = TABLE.iter().map(images).sum();
        assert!(code <= archs * (4 << 20), "{code} bytes of machine code for {archs} architectures");
    }
}
