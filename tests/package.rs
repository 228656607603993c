//! What a package of this crate and of softcuda holds: enough to build it and its examples without this repository, its licence,
//! and a README whose links lead somewhere.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

const PACKAGES: [(&str, &str); 2] = [("moe-kernels", "."), ("softcuda", "softcuda")];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn cargo(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO"))
        .args(arguments)
        .args(["--allow-dirty", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo starts");
    assert!(output.status.success(), "cargo {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("names of files are UTF-8")
}

/// Paths of the files in a package.
fn files(package: &str) -> BTreeSet<String> {
    cargo(&["package", "--list", "-p", package]).lines().map(|line| line.replace('\\', "/")).collect()
}

#[test]
fn what_a_package_holds() {
    for (package, folder) in PACKAGES {
        let files = files(package);
        for name in ["Cargo.toml", "README.md", "LICENSE-APACHE", "LICENSE-MIT", "build.rs", "src/lib.rs"] {
            assert!(files.contains(name), "{package} has no {name}");
        }
        let outside = ["tests/", "benches/", ".ci/", "target/"];
        let strays: Vec<&String> =
            files.iter().filter(|file| outside.iter().any(|folder| file.starts_with(folder))).collect();
        assert!(strays.is_empty(), "{package}: {strays:?}");
        // Whole folders: a source that is left out would be missed only by who builds the package.
        for part in ["src", "kernels", "examples"].map(|part| root().join(folder).join(part)) {
            for path in below(&part) {
                let name = path.strip_prefix(root().join(folder)).unwrap().to_str().unwrap().replace('\\', "/");
                assert!(files.contains(&name), "{package} lacks {name}");
            }
        }
    }
    let licences = ["LICENSE-APACHE", "LICENSE-MIT"].map(|name| {
        let read = |folder: &str| std::fs::read_to_string(root().join(folder).join(name)).unwrap();
        (read("."), read("softcuda"))
    });
    assert!(licences.iter().all(|(ours, its)| ours == its), "both have the same licences");
}

/// All files in a folder and its folders; none where there is no folder.
fn below(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { below(&path) } else { vec![path] }).collect()
}

#[test]
fn links_of_the_readme_lead_into_the_package() {
    for (package, folder) in PACKAGES {
        let files = files(package);
        let text = std::fs::read_to_string(root().join(folder).join("README.md")).unwrap();
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://") && !link.starts_with('#')) {
            let path = link.split('#').next().unwrap_or(link);
            let is_folder = files.iter().any(|file| file.starts_with(&format!("{}/", path.trim_end_matches('/'))));
            assert!(
                files.contains(path) || is_folder,
                "{package}: the README links to {link}, which is not in the package"
            );
        }
    }
}

/// The manifests as cargo writes them for a package, where paths mean nothing any more.
#[test]
fn manifests_of_the_packages() {
    let target = TempDir::with_prefix("moe-kernels-").expect("a temporary folder can be made");
    let folder = target.path().to_str().expect("a temporary folder has a plain name");
    cargo(&["package", "--no-verify", "--target-dir", folder, "-p", "softcuda", "-p", "moe-kernels"]);
    for (package, _) in PACKAGES {
        let name = format!("{package}-{}", env!("CARGO_PKG_VERSION"));
        let output = Command::new("tar")
            .args(["-xzOf", &format!("{folder}/package/{name}.crate"), &format!("{name}/Cargo.toml")])
            .output()
            .expect("tar starts");
        let manifest = String::from_utf8(output.stdout).unwrap();
        for field in ["description", "license", "keywords", "categories", "readme", "rust-version"] {
            assert!(manifest.contains(&format!("\n{field} = ")), "{package} has no {field}:\n{manifest}");
        }
        assert!(!manifest.contains("path = \"softcuda\""), "{manifest}");
        // The examples run on softcuda where there is no GPU.
        if package == "moe-kernels" {
            for dependency in ["softcuda", "clap", "tempfile", "safetensors", "serde_json", "indicatif"] {
                let table = format!("[dev-dependencies.{dependency}]");
                assert!(manifest.contains(&table), "the examples need {dependency}:\n{manifest}");
            }
        }
    }
}
