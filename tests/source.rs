//! What the compiler does not check in the source tree.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The longest line of prose, in characters.
const WIDTH: usize = 100;

#[test]
fn prose_wraps_at_100_columns() {
    // The workspace may have moved since the build: `cargo test` sets the variable.
    let tests = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let mut files = Vec::new();
    find(Path::new(&tests).parent().expect("a folder around the tests"), &mut files);
    let long: Vec<String> = files.iter().flat_map(|path| long_lines(path)).collect();
    assert!(!files.is_empty() && long.is_empty(), "{} lines are too long:\n{}", long.len(), long.join("\n"));
}

/// As Grafana imports it.
#[test]
fn the_dashboard_of_the_example_prometheus_is_complete() {
    use serde_json::Value;

    let dashboard: Value = serde_json::from_str(include_str!("../examples/prometheus/dashboard.json")).expect("JSON");
    let source = &dashboard["templating"]["list"][0];
    assert_eq!((&source["name"], &source["type"]), (&"datasource".into(), &"datasource".into()));
    let panels = dashboard["panels"].as_array().expect("the panels");
    assert!(!panels.is_empty());
    for (panel, id) in panels.iter().zip(1..) {
        assert_eq!((&panel["id"], &panel["type"]), (&id.into(), &"timeseries".into()));
        assert!(panel["title"].is_string() && panel["gridPos"]["w"].is_u64(), "{panel}");
        let targets = panel["targets"].as_array().expect("the expressions");
        for (target, letter) in targets.iter().zip('A'..) {
            assert_eq!(target["refId"], letter.to_string());
            assert!(target["expr"].is_string() && target["datasource"]["uid"] == "${datasource}", "{target}");
        }
    }
}

/// Rust files and documents, without hidden and generated ones.
fn find(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry of a folder").path();
        let name = path.file_name().expect("a name").to_string_lossy();
        if name.starts_with('.') || name == "target" || name == "RESULTS.md" {
            continue;
        } else if path.is_dir() {
            find(&path, files);
        } else if name.ends_with(".rs") || name.ends_with(".md") {
            files.push(path);
        }
    }
}

/// The lines of a Rust file that are comments, or of a document outside of code, and are too long.
fn long_lines(path: &Path) -> Vec<String> {
    let is_rust = path.extension().is_some_and(|extension| extension == "rs");
    let mut in_code = false;
    let mut long = Vec::new();
    for (line, number) in fs::read_to_string(path).expect("a text").lines().zip(1..) {
        let text = line.trim_start();
        in_code ^= text.starts_with("```");
        let is_prose = if is_rust { text.starts_with("//") } else { !in_code };
        // Rows of tables, addresses and links cannot be wrapped.
        let text = text.trim_start_matches(['/', '!']).trim();
        let is_link = text.starts_with('[') && (text.ends_with(')') || text.contains("]: "));
        let may_be_long = text.starts_with('|') || text.contains("://") || is_link;
        if is_prose && line.chars().count() > WIDTH && !may_be_long {
            long.push(format!("{}:{number}", path.display()));
        }
    }
    long
}
