//! One text for two architectures: what later ones add stands in it as comments. Compiled into `build.rs` and into `src/`.

/// What a line for compute capability 9.0 and later begins with.
const MARK: &str = "//sm_90 ";

/// The text for devices of at least that capability, where it has such lines: they are instructions there.
pub fn for_sm_90(ptx: &str) -> Option<String> {
    if !ptx.contains(MARK) {
        return None;
    }
    // griddepcontrol is of PTX 7.8.
    let head = [(".version 7.0\n", ".version 7.8\n"), (".target sm_80\n", ".target sm_90\n")];
    let text = head.into_iter().fold(ptx.to_owned(), |text, (old, new)| {
        assert!(text.contains(old), "what has lines for later architectures begins with `{}`", old.trim());
        text.replacen(old, new, 1)
    });
    Some(text.replace(MARK, ""))
}
