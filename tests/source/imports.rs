//! Which modules of a crate import which.

use std::collections::{BTreeMap, BTreeSet};

use crate::rust::{after_bracket, find_word, is_word, layers, without_tests};

/// A folder of modules, and the other folders that these may import.
pub(crate) struct Folder {
    pub(crate) name: &'static str,
    pub(crate) imports: &'static [&'static str],
}

/// What each module of a crate imports of the same crate, `lib.rs` and test modules left out.
///
/// A folder's `mod.rs` and the modules in the folder may import each other.
pub(crate) struct Imports(BTreeMap<String, BTreeSet<String>>);

impl Imports {
    /// Of a crate's files: their names in `src`, and their texts.
    pub(crate) fn of(files: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut root = String::new();
        let mut sources = BTreeMap::new();
        for (name, text) in files {
            let code = without_tests(&layers(&text).code);
            match module(&name) {
                Some(module) if module.is_empty() => root = code,
                Some(module) => _ = sources.insert(module, code),
                None => {}
            }
        }
        let modules: BTreeSet<String> = sources.keys().cloned().collect();
        let names = Names { reexports: reexports(&root), modules };
        let edges = sources.iter().map(|(module, code)| {
            let imported = paths(code, module).into_iter().filter_map(|path| names.resolve(&path, module));
            (module.clone(), imported.filter(|other| !related(module, other)).collect())
        });
        Self(edges.collect())
    }

    /// Whether there is such a module or folder.
    pub(crate) fn has(&self, folder: &str) -> bool {
        self.0.keys().any(|module| folder_of(module) == folder)
    }

    /// The modules that import each other, directly or through others.
    pub(crate) fn circles(&self) -> Vec<Vec<String>> {
        let reached: BTreeMap<&String, BTreeSet<&String>> =
            self.0.keys().map(|module| (module, self.reached(module))).collect();
        let mut circles = BTreeSet::new();
        for (module, others) in &reached {
            if others.contains(module) {
                let together = others.iter().filter(|other| reached[*other].contains(module));
                circles.insert(together.map(|other| (*other).clone()).collect());
            }
        }
        circles.into_iter().collect()
    }

    /// All that a module imports, directly or through others.
    fn reached(&self, module: &str) -> BTreeSet<&String> {
        let mut reached = BTreeSet::new();
        let mut next: Vec<&String> = self.0[module].iter().collect();
        while let Some(other) = next.pop() {
            if reached.insert(other) {
                next.extend(&self.0[other]);
            }
        }
        reached
    }

    /// Imports that a folder must not have.
    pub(crate) fn against(&self, folders: &[Folder]) -> Vec<String> {
        let mut wrong = Vec::new();
        for (module, imported) in &self.0 {
            let Some(folder) = folders.iter().find(|folder| folder.name == folder_of(module)) else { continue };
            let others = imported.iter().filter(|other| {
                let other = folder_of(other);
                other != folder.name && !folder.imports.contains(&other)
            });
            wrong.extend(others.map(|other| format!("{module} imports {other}")));
        }
        wrong
    }
}

/// The names that paths begin with.
struct Names {
    modules: BTreeSet<String>,
    /// What `lib.rs` makes known by another path.
    reexports: BTreeMap<String, String>,
}

impl Names {
    /// The module that a path from the crate's root leads into. `None` for one that is not
    /// followed, and for other crates.
    fn resolve(&self, path: &Reference, from: &str) -> Option<String> {
        let path = match path {
            Reference::Root(path) => {
                let first = path.split("::").next().unwrap_or_default();
                if self.modules.iter().any(|module| folder_of(module) == first) {
                    path.clone()
                } else {
                    self.reexports.get(first)?.clone()
                }
            }
            // By the name of a child, or of another crate.
            Reference::Plain(path) => {
                let first = join(from, path.split("::").next().unwrap_or_default());
                self.modules.iter().find(|module| **module == first)?;
                join(from, path)
            }
        };
        let ends = path.match_indices("::").map(|(at, _)| at).chain([path.len()]);
        ends.filter_map(|end| self.modules.get(&path[..end])).last().cloned()
    }
}

/// A path in the code of a module.
#[derive(Debug, PartialEq, Eq)]
enum Reference {
    /// From the crate's root.
    Root(String),
    /// Without `crate`, `self` or `super`.
    Plain(String),
}

/// The module that a file of `src` holds: empty for `lib.rs`, `None` for tests.
fn module(file: &str) -> Option<String> {
    let path = file.strip_suffix(".rs")?.replace('/', "::");
    if path == "lib" {
        return Some(String::new());
    }
    let tests = path.split("::").any(|part| part.ends_with("tests"));
    (!tests).then(|| path.strip_suffix("::mod").unwrap_or(&path).to_owned())
}

/// The first part of a module's path.
fn folder_of(module: &str) -> &str {
    module.split("::").next().unwrap_or(module)
}

/// Whether two modules are the same, or one is in the other's folder.
fn related(one: &str, other: &str) -> bool {
    let within = |inner: &str, outer: &str| inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with("::"));
    one == other || within(one, other) || within(other, one)
}

fn join(module: &str, path: &str) -> String {
    if module.is_empty() || path.is_empty() { format!("{module}{path}") } else { format!("{module}::{path}") }
}

fn parent(module: &str) -> &str {
    module.rsplit_once("::").map_or("", |(parent, _)| parent)
}

/// What `lib.rs` names by `use`, by the name that the crate's modules know it by.
fn reexports(root: &str) -> BTreeMap<String, String> {
    let mut names = BTreeMap::new();
    for path in uses(root).0 {
        let (path, alias) = path.split_once(" as ").unwrap_or((&path, ""));
        let path = path.trim();
        let path = path.strip_prefix("crate::").or(path.strip_prefix("self::")).unwrap_or(path);
        let name = if alias.is_empty() { path.rsplit("::").next().unwrap_or(path) } else { alias.trim() };
        names.insert(name.to_owned(), path.to_owned());
    }
    names
}

/// All paths in a module's code that may lead to others of the crate.
fn paths(code: &str, module: &str) -> Vec<Reference> {
    let (inline, outside) = inline_modules(code);
    let (used, rest) = uses(&outside);
    let mut paths: Vec<Reference> = used.iter().map(|path| reference(path, module)).collect();
    paths.extend(inline_paths(&rest).iter().map(|path| reference(path, module)));
    for (name, body) in inline {
        // In an inline module `super` is the file's own.
        paths.extend(self::paths(&body, &join(module, &name)));
    }
    paths
}

/// Takes the modules that a file holds itself out of its code: their names and code, and the rest.
fn inline_modules(code: &str) -> (Vec<(String, String)>, String) {
    let (mut modules, mut rest, mut from) = (Vec::new(), String::new(), 0);
    let mut at = 0;
    while let Some(found) = find_word(code, "mod", at) {
        at = found + "mod".len();
        let name: String = code[at..].trim_start().chars().take_while(|c| is_word(*c)).collect();
        let after_name = at + (code[at..].len() - code[at..].trim_start().len()) + name.len();
        let space = code[after_name..].len() - code[after_name..].trim_start().len();
        if !name.is_empty() && code[after_name + space..].starts_with('{') {
            let open = after_name + space;
            at = after_bracket(code, open);
            modules.push((name, code[open + 1..at.max(open + 2) - 1].to_owned()));
            rest.push_str(&code[from..found]);
            from = at;
        }
    }
    rest.push_str(&code[from..]);
    (modules, rest)
}

/// The paths of all `use` items, one for each name, and the code without these items.
fn uses(code: &str) -> (Vec<String>, String) {
    let (mut paths, mut rest, mut from) = (Vec::new(), String::new(), 0);
    let mut at = 0;
    while let Some(found) = find_word(code, "use", at) {
        at = found + "use".len();
        // `use<'a>` in a bound is something else.
        if code[at..].trim_start().starts_with('<') {
            continue;
        }
        let end = code[at..].find(';').map_or(code.len(), |end| at + end);
        expand(&code[at..end], &mut paths);
        rest.push_str(&code[from..found]);
        (at, from) = (end, end);
    }
    rest.push_str(&code[from..]);
    (paths, rest)
}

/// Writes `a::{b, c}` as `a::b` and `a::c`.
fn expand(tree: &str, paths: &mut Vec<String>) {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        if !tree.is_empty() {
            paths.push(tree.split_whitespace().collect::<Vec<_>>().join(" "));
        }
        return;
    };
    let (prefix, mut branch, mut depth) = (&tree[..open], String::new(), 0);
    for c in tree[open + 1..after_bracket(tree, open) - 1].chars() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if c == ',' && depth == 0 {
            expand_branch(prefix, &branch, paths);
            branch.clear();
        } else {
            branch.push(c);
        }
    }
    expand_branch(prefix, &branch, paths);
}

fn expand_branch(prefix: &str, branch: &str, paths: &mut Vec<String>) {
    if !branch.trim().is_empty() {
        expand(&format!("{prefix}{}", branch.trim()), paths);
    }
}

/// The paths from `crate`, `super` and `self` in code.
fn inline_paths(code: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for word in ["crate", "super", "self"] {
        let mut at = 0;
        while let Some(found) = find_word(code, word, at) {
            let path: String = code[found..].chars().take_while(|c| is_word(*c) || *c == ':').collect();
            at = found + word.len();
            // `super::super` is found at its first word; `pub(in crate::a)` imports nothing.
            let (before, visibility) = (code[..found].trim_end(), code[..found].ends_with("in "));
            if path[word.len()..].starts_with("::") && !before.ends_with("::") && !visibility {
                paths.push(path);
            }
        }
    }
    paths
}

/// What a path in a module means.
fn reference(path: &str, module: &str) -> Reference {
    let path = path.split(" as ").next().unwrap_or(path).trim();
    if let Some(path) = path.strip_prefix("crate::") {
        return Reference::Root(path.to_owned());
    }
    let (mut rest, mut base, mut relative) = (path, module, false);
    if let Some(path) = rest.strip_prefix("self::") {
        (rest, relative) = (path, true);
    }
    while let Some(path) = rest.strip_prefix("super::") {
        (rest, base, relative) = (path, parent(base), true);
    }
    if relative { Reference::Root(join(base, rest)) } else { Reference::Plain(rest.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::{Folder, Imports};

    const FOLDERS: [Folder; 2] = [Folder { name: "low", imports: &[] }, Folder { name: "middle", imports: &["low"] }];

    fn imports(files: &[(&str, &str)]) -> Imports {
        Imports::of(files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())))
    }

    /// One folder a line, each of which imports only those before it.
    const SOUND: [(&str, &str); 5] = [
        ("lib.rs", "mod low; mod middle; mod top;\npub use {low::Thing, middle::inner::Other as Renamed};"),
        ("low.rs", "use std::fmt;\npub struct Thing;"),
        ("middle/mod.rs", "mod inner; mod side;\nuse self::inner::Other; use crate::low::Thing;"),
        ("middle/inner.rs", "use super::{Shared, side::Side};\nuse crate::{low, Thing};"),
        ("top.rs", "fn f() -> crate::low::Thing { crate::Renamed.into() }"),
    ];

    #[track_caller]
    fn with(change: (&str, &str)) -> Imports {
        let mut files = SOUND.to_vec();
        files.retain(|(name, _)| *name != change.0);
        files.push(change);
        imports(&files)
    }

    #[test]
    fn a_sound_crate_has_no_fault() {
        let imports = imports(&SOUND);
        assert!(imports.circles().is_empty(), "{:?}", imports.circles());
        assert!(imports.against(&FOLDERS).is_empty(), "{:?}", imports.against(&FOLDERS));
        assert!(imports.has("middle") && !imports.has("attic"));
        assert_eq!(imports.0["top"].iter().collect::<Vec<_>>(), ["low", "middle::inner"]);
        assert_eq!(imports.0["middle::inner"].iter().collect::<Vec<_>>(), ["low"]);
    }

    #[test]
    fn a_circle_of_two_is_found() {
        for text in [
            "use crate::top::f;",
            "use crate::{self as this, top as roof};",
            "use super::top::f;",
            "fn g() { crate::top::f(); }",
            "fn g() { super::top::f(); }",
            "mod within { use crate::{top::{f, g}}; }",
            "mod within { use super::super::top::f; }",
            "#[cfg(test)]\nmod tests { fn t() {} }\nuse crate::top::f;",
            "struct S { #[cfg(test)] seen: u8, top: crate::top::T }",
            "const QUOTE: char = '\"'; use crate::top::f; const OTHER: char = '\"';",
        ] {
            let imports = imports(&[("lib.rs", SOUND[0].1), ("low.rs", text), ("top.rs", "use crate::Thing;")]);
            assert_eq!(imports.circles(), [["low", "top"]], "{text}");
        }
    }

    #[test]
    fn a_circle_through_a_reexport_is_found() {
        assert_eq!(with(("low.rs", "use crate::Renamed;")).circles(), [["low", "middle::inner"]]);
    }

    #[test]
    fn a_circle_of_three_is_found_once() {
        let files = [("a.rs", "use crate::b::B;"), ("b.rs", "use crate::c;"), ("c.rs", "fn c() { crate::a::a() }")];
        assert_eq!(imports(&files).circles(), [["a", "b", "c"]]);
    }

    #[test]
    fn siblings_of_a_folder_are_a_circle_too() {
        let files = [("x/mod.rs", "mod a; mod b;"), ("x/a.rs", "use super::b::B;"), ("x/b.rs", "use super::a::A;")];
        assert_eq!(imports(&files).circles(), [["x::a", "x::b"]]);
    }

    #[test]
    fn a_wrong_direction_is_found() {
        assert_eq!(
            with(("low.rs", "use crate::middle::inner::Other;")).against(&FOLDERS),
            ["low imports middle::inner"]
        );
        assert_eq!(with(("low.rs", "use crate::Renamed;")).against(&FOLDERS), ["low imports middle::inner"]);
        assert_eq!(
            with(("middle/inner.rs", "use super::super::top;")).against(&FOLDERS),
            ["middle::inner imports top"]
        );
    }

    #[test]
    fn tests_comments_literals_and_visibilities_import_nothing() {
        for text in [
            "#[cfg(test)]\nmod tests { use crate::top::f; }",
            "#[cfg(all(test, feature = \"x\"))]\npub(crate) mod helpers { use crate::top::f; }",
            "#[cfg(test)]\nuse crate::top::f;",
            "#[cfg(test)]\n#[allow(unused)]\nfn t() { crate::top::f() }",
            "// use crate::top::f;\n/* crate::top::f() /* */ crate::top::f() */",
            "const S: &str = \"\\\"use crate::top::f;\"; const R: &str = r#\"\"crate::top::f\"#;",
            "pub(in crate::top) struct S;",
            "fn f<'a>(s: &'a str) -> impl Sized + use<'a> { s }",
            "use top::f;",
        ] {
            let imports = with(("low.rs", text));
            assert!(imports.0["low"].is_empty(), "{text}: {:?}", imports.0["low"]);
        }
        assert!(with(("low/tests.rs", "use crate::top::f;")).circles().is_empty());
    }
}
