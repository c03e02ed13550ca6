#![allow(clippy::unwrap_used, reason = "a test may panic")]
//! README.md and docs/ against the program: links lead somewhere, commands parse, jobs load.

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Path and text of each page.
fn pages() -> Vec<(PathBuf, String)> {
    let mut paths = vec![root().join("README.md"), root().join("ARCHITECTURE.md"), root().join("CHANGELOG.md")];
    let docs = std::fs::read_dir(root().join("docs")).unwrap().map(|e| e.unwrap().path());
    paths.extend(docs.filter(|p| p.extension().is_some_and(|e| e == "md")));
    paths.sort();
    paths.into_iter().map(|p| (p.clone(), std::fs::read_to_string(&p).unwrap())).collect()
}

/// The anchor that GitHub makes of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn anchors(page: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(page).unwrap();
    text.lines().filter_map(|l| l.strip_prefix('#')).map(|l| anchor(l.trim_start_matches('#'))).collect()
}

#[test]
fn every_relative_link_leads_somewhere() {
    let mut seen = 0;
    for (page, text) in pages() {
        for (at, _) in text.match_indices("](") {
            let target = text[at + 2..].split(')').next().unwrap();
            if target.contains("://") || target.contains(char::is_whitespace) {
                continue;
            }
            let (file, fragment) = target.split_once('#').map_or((target, None), |(f, a)| (f, Some(a)));
            let to = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            assert!(to.exists(), "{}: {target}", page.display());
            if let Some(fragment) = fragment {
                assert!(anchors(&to).iter().any(|a| a == fragment), "{}: {target}", page.display());
            }
            seen += 1;
        }
    }
    assert!(seen > 20, "{seen} links");
}

/// Commands in code blocks and in backquotes, without comments and what comes after a pipe.
fn commands(text: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            continue;
        }
        let code = line.trim_start();
        if code.starts_with("backfilld ") && (fenced || line.starts_with("    ")) {
            out.push(code.to_owned());
        } else if !fenced {
            out.extend(line.split('`').skip(1).step_by(2).filter(|c| c.starts_with("backfilld ")).map(str::to_owned));
        }
    }
    let bare = |c: String| c.split(" #").next().unwrap().split(" |").next().unwrap().trim().to_owned();
    out.into_iter().map(bare).filter(|c| c.contains(' ')).collect()
}

#[test]
fn every_command_in_the_documentation_parses() {
    let mut seen = 0;
    for (page, text) in pages() {
        // Made from the command line itself; its first lines are usages.
        if page.ends_with("docs/cli.md") {
            continue;
        }
        for command in commands(&text) {
            if command.contains("<command>") {
                continue;
            }
            let words = command.replace("$job", "job").replace("<job>", "job").replace("...", "x");
            let parsed = backfilld::cli::command()
                .try_get_matches_from(words.split_whitespace().map(|w| w.trim_matches(['\'', '"'])));
            let fine = match &parsed {
                Ok(_) => true,
                Err(e) => {
                    use clap::error::ErrorKind::{DisplayHelp, DisplayVersion, MissingRequiredArgument};
                    // A command's bare name is a mention of it.
                    let mention = e.kind() == MissingRequiredArgument && words.split_whitespace().count() == 2;
                    mention || matches!(e.kind(), DisplayHelp | DisplayVersion)
                }
            };
            assert!(fine, "{}: {command}: {}", page.display(), parsed.err().unwrap());
            seen += 1;
        }
    }
    assert!(seen > 20, "{seen} commands");
}

/// Blocks that are TOML: fenced as such, or indented and beginning with a table.
fn toml_blocks(text: &str) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let (mut fenced, mut indented) = (false, false);
    for line in text.lines() {
        if line.starts_with("```") {
            fenced = line == "```toml";
            if fenced {
                out.push(String::new());
            }
            continue;
        }
        let begins = !fenced && line.strip_prefix("    [").is_some_and(|rest| rest.trim_end().ends_with(']'));
        if begins && !indented {
            out.push(String::new());
            indented = true;
        } else if indented && !line.starts_with("    ") && !line.is_empty() {
            indented = false;
        }
        if fenced || indented {
            let last = out.last_mut().unwrap();
            *last += line.strip_prefix("    ").filter(|_| indented).unwrap_or(line);
            last.push('\n');
        }
    }
    out
}

#[test]
fn every_job_in_the_documentation_loads() {
    const REST: &str = "name = \"j\"\n[target]\ntable = \"public.t\"\n[[columns]]\nname = \"c\"\nvalue = \"t.x\"\n";
    let mut seen = 0;
    for (page, text) in pages() {
        if page.ends_with("docs/job-reference.md") || page.ends_with("docs/settings.md") {
            continue;
        }
        for block in toml_blocks(&text) {
            let whole = if block.contains("[target]") { block.clone() } else { format!("{REST}{block}") };
            let loaded = backfilld::job::load::parse(&whole, "job.toml", |_| Ok("select 1".to_owned()));
            assert!(loaded.is_ok(), "{}:\n{block}\n{}", page.display(), loaded.err().unwrap().render());
            seen += 1;
        }
    }
    assert!(seen > 3, "{seen} jobs");
}

#[test]
fn every_page_is_in_the_index() {
    let index = std::fs::read_to_string(root().join("docs/README.md")).unwrap();
    for (page, _) in pages().into_iter().filter(|(p, _)| p.parent() == Some(&root().join("docs"))) {
        let name = page.file_name().unwrap().to_str().unwrap();
        assert!(name == "README.md" || index.contains(&format!("({name})")), "{name}");
    }
}
