//! The source tree itself: what its modules import, and how wide its prose is.

mod imports;
mod prose;
mod rust;

use std::{
    fs,
    path::{Path, PathBuf},
};

use imports::{Folder, Imports};

/// Folders of `src`, and what they may import of it. All others may import these. The crates below
/// `crates/` need no check: Cargo refuses circles between crates.
const FOLDERS: [Folder; 1] = [Folder { name: "io", imports: &[] }];

/// Documents with prose.
const DOCUMENTS: [&str; 8] = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "ARCHITECTURE.md",
    "SECURITY.md",
    "crates/nfqueue-divert/README.md",
    "crates/nfqueue-proto/README.md",
    "fuzz/README.md",
];

#[test]
fn imports_have_no_circles_and_point_one_way() {
    let src = root().join("src");
    let sources = rust_files(&src).into_iter().map(|path| {
        let name = path.strip_prefix(&src).expect("a file in src").to_str().expect("a name in UTF-8").to_owned();
        (name, read(&path))
    });
    let imports = Imports::of(sources);
    let mut faults = Vec::new();
    faults.extend(
        FOLDERS.iter().filter(|folder| !imports.has(folder.name)).map(|folder| format!("no folder {}", folder.name)),
    );
    faults.extend(imports.circles().iter().map(|circle| format!("circle: {}", circle.join(" "))));
    faults.extend(imports.against(&FOLDERS));
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn prose_wraps_at_100_columns() {
    let root = root();
    let folders =
        ["src", "tests", "examples", "benches", "crates", "fuzz/src", "fuzz/targets"].map(|name| root.join(name));
    let sources = folders.iter().flat_map(|folder| rust_files(folder));
    let documents = DOCUMENTS.iter().map(|name| root.join(name));
    let long_in = |path: &Path, check: fn(&str) -> Vec<usize>| {
        let lines = check(&read(path));
        let name = path.strip_prefix(&root).expect("a file of the package").display().to_string();
        lines.into_iter().map(move |line| format!("{name}:{line}"))
    };
    let mut long = Vec::new();
    sources.for_each(|path| long.extend(long_in(&path, prose::long_comments)));
    documents.for_each(|path| long.extend(long_in(&path, prose::long_lines)));
    assert!(long.is_empty(), "{} lines longer than {}:\n{}", long.len(), prose::WIDTH, long.join("\n"));
}

fn root() -> PathBuf {
    // The workspace may have moved since the build: `cargo test` sets the variable.
    let tests = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&tests).parent().expect("a folder around the tests").to_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All Rust files below a folder, in order.
fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.expect("an entry of a folder").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}
