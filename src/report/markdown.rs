//! The report as Markdown. Pure.

use std::fmt::Write as _;

use super::Report;
use super::tables::{self, Table};

/// Text for Markdown, one line, also inside a table.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '#' => out.extend(['\\', c]),
            '<' => out.push_str("&lt;"),
            '&' => out.push_str("&amp;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// The file.
pub fn markdown(r: &Report) -> String {
    let mut out = format!("# {}\n\n", escape(&r.job));
    if !r.description.is_empty() {
        let _ = writeln!(out, "{}\n", escape(&r.description));
    }
    let _ = writeln!(
        out,
        "{} of {}. **{}**, phase {}. {}; begun {} UTC, written {} UTC.\n",
        escape(&r.columns.join(", ")),
        escape(&r.target),
        escape(&r.status),
        escape(&r.phase),
        escape(&r.server),
        escape(&r.started_at),
        escape(&r.written_at)
    );
    for (name, text) in [("Reason", &r.reason), ("Next", &r.hint)] {
        if !text.is_empty() {
            let _ = writeln!(out, "{name}: {}\n", escape(text));
        }
    }
    for (name, value) in tables::facts(r) {
        let _ = writeln!(out, "- {name}: {}", escape(&value));
    }
    section(&mut out, "What was done, and when (UTC)", &tables::course(r));
    section(&mut out, "Proofs", &tables::proofs(r));
    section(&mut out, "Queries before and after", &[tables::queries(r)]);
    section(&mut out, "What remains", &tables::remains(r));
    out.push_str("\n## How to undo\n");
    for undo in &r.undo {
        let _ = write!(out, "\n    {}\n\n{}\n", undo.command.replace(char::is_control, " "), escape(&undo.what));
    }
    out
}

fn section(out: &mut String, title: &str, list: &[Table]) {
    let _ = writeln!(out, "\n## {}", escape(title));
    for t in list {
        let _ = writeln!(out, "\n### {}\n", escape(&t.title));
        if !t.rows.is_empty() {
            let row = |cells: &[String]| format!("| {} |", cells.join(" | "));
            let heads: Vec<String> = t.head.iter().map(|h| escape(h.trim_start_matches('#'))).collect();
            let rules: Vec<String> =
                t.head.iter().map(|h| if h.starts_with('#') { "---:" } else { "---" }.to_owned()).collect();
            let _ = writeln!(out, "{}\n{}", row(&heads), row(&rules));
            for cells in &t.rows {
                let _ = writeln!(out, "{}", row(&cells.iter().map(|c| escape(c)).collect::<Vec<_>>()));
            }
        }
        if !t.note.is_empty() {
            let _ = writeln!(out, "{}{}", if t.rows.is_empty() { "" } else { "\n" }, escape(&t.note));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_stays_a_cell() {
        assert_eq!(escape("a|b\n<script>`_*"), "a\\|b &lt;script>\\`\\_\\*");
    }
}
