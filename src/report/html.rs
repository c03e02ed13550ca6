//! The report as one HTML file: no script, nothing from elsewhere, everything escaped. Pure.

use std::fmt::Write as _;

use super::tables::{self, Table};
use super::{Report, charts};
use crate::ledger::plans::QueryPlan;

const CSS: &str = include_str!("report.css");

/// Text for HTML, inside and outside of attributes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Others than tab and newline are no characters of HTML.
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// The file.
pub fn html(r: &Report) -> String {
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>{}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n<main>\n",
        escape(&format!("{}: report of a backfill", r.job))
    );
    head(&mut out, r);
    section(&mut out, "Course", "");
    out.push_str(&charts::charts(&r.samples));
    numbers(&mut out, r);
    section(
        &mut out,
        "What was done, and when",
        "Times are UTC. A lock is held from its acquisition to the answer to COMMIT.",
    );
    all(&mut out, &tables::course(r));
    section(&mut out, "Proofs", "");
    all(&mut out, &tables::proofs(r));
    let explained = "EXPLAIN (ANALYZE, BUFFERS), as the role and user of the application: planning and execution, the median of \
                     five runs with warm caches, and pages of 8 kB that were touched. Small, median and large are owners by \
                     their number of rows.";
    section(&mut out, "Queries before and after", explained);
    all(&mut out, &[tables::queries(r)]);
    plans(&mut out, r);
    section(&mut out, "What remains", "");
    all(&mut out, &tables::remains(r));
    section(&mut out, "How to undo", "");
    for undo in &r.undo {
        let _ = write!(out, "<pre>{}</pre>\n<p class=\"note\">{}</p>\n", escape(&undo.command), escape(&undo.what));
    }
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

fn head(out: &mut String, r: &Report) {
    let _ = writeln!(out, "<h1>{}</h1>", escape(&r.job));
    if !r.description.is_empty() {
        let _ = writeln!(out, "<p>{}</p>", escape(&r.description));
    }
    let good = matches!(r.status.as_str(), "done" | "running" | "held" | "paused" | "rolled_back");
    let _ = writeln!(
        out,
        "<p>{} of {}. <span class=\"status {}\">{}</span>, phase {}. {}; begun {} UTC, written {} UTC.</p>",
        escape(&r.columns.join(", ")),
        escape(&r.target),
        if good { "ok" } else { "bad" },
        escape(&r.status),
        escape(&r.phase),
        escape(&r.server),
        escape(&r.started_at),
        escape(&r.written_at)
    );
    for (name, text) in [("Reason", &r.reason), ("Next", &r.hint)] {
        if !text.is_empty() {
            let _ = writeln!(out, "<p>{name}: {}</p>", escape(text));
        }
    }
    out.push_str("<dl>\n");
    for (name, value) in tables::facts(r) {
        let _ = writeln!(out, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(&value));
    }
    out.push_str("</dl>\n");
}

fn section(out: &mut String, title: &str, note: &str) {
    let _ = writeln!(out, "<h2>{}</h2>", escape(title));
    if !note.is_empty() {
        let _ = writeln!(out, "<p class=\"note\">{}</p>", escape(note));
    }
}

fn all(out: &mut String, list: &[Table]) {
    for t in list {
        table(out, t);
    }
}

fn table(out: &mut String, t: &Table) {
    if t.rows.is_empty() {
        let _ = writeln!(out, "<h3>{}</h3>\n<p class=\"note\">{}</p>", escape(&t.title), escape(&t.note));
        return;
    }
    let class = |head: &str| if head.starts_with('#') { " class=\"n\"" } else { "" };
    let name = |head: &str| escape(head.trim_start_matches('#'));
    let _ =
        write!(out, "<div class=\"scroll\"><table class=\"stack\"><caption>{}</caption><thead><tr>", escape(&t.title));
    for head in &t.head {
        let _ = write!(out, "<th scope=\"col\"{}>{}</th>", class(head), name(head));
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    for row in &t.rows {
        out.push_str("<tr>");
        for (head, cell) in t.head.iter().zip(row) {
            let _ = write!(out, "<td{} data-head=\"{}\"><span>{}</span></td>", class(head), name(head), escape(cell));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
    if !t.note.is_empty() {
        let _ = writeln!(out, "<p class=\"note\">{}</p>", escape(&t.note));
    }
}

/// The charts' numbers, for those who cannot see them; some of them, evenly.
fn numbers(out: &mut String, r: &Report) {
    const ROWS: usize = 40;
    let Some(first) = r.samples.first() else { return };
    let step = r.samples.len().div_ceil(ROWS).max(1);
    let some = |v: Option<f64>| v.map_or("-".into(), tables::ms);
    let rows = r.samples.iter().step_by(step).map(|s| {
        vec![
            tables::duration(s.at - first.at),
            s.phase.clone(),
            tables::count(s.rows_scanned),
            some(s.batch_p50_ms),
            some(s.batch_p99_ms),
            tables::bytes((s.wal_bytes - first.wal_bytes) as f64),
            tables::bytes(s.table_bytes as f64),
            tables::bytes(s.index_bytes as f64),
        ]
    });
    let head = vec!["#After", "Phase", "#Rows", "#Batch, median", "#Batch, p99", "#WAL", "#Table", "#Indexes"];
    let shown = Table { title: "The course in numbers".into(), head, rows: rows.collect(), note: String::new() };
    out.push_str("<details><summary>The course in numbers</summary>\n");
    table(out, &shown);
    out.push_str("</details>\n");
}

fn plans(out: &mut String, r: &Report) {
    for (before, after) in tables::pairs(&r.plans) {
        let Some(any) = before.or(after) else { continue };
        let title = format!("Plans of {}, {} owner ({} rows)", any.query, any.owner, tables::count(any.owner_rows));
        let _ = writeln!(out, "<details><summary>{}</summary>\n<div class=\"plans\">", escape(&title));
        one_plan(out, "Before", before);
        one_plan(out, "After", after);
        out.push_str("</div></details>\n");
    }
}

fn one_plan(out: &mut String, title: &str, plan: Option<&QueryPlan>) {
    let text = match plan {
        None => "not measured".to_owned(),
        Some(p) if !p.error.is_empty() => p.error.clone(),
        Some(p) => p.nodes.join("\n"),
    };
    let _ = writeln!(out, "<div><h3>{title}</h3><pre>{}</pre></div>", escape(&text));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_gets_out_of_text_or_attribute() {
        assert_eq!(
            escape("<a href=\"x\" b='y'>&\u{0}\u{1b}"),
            "&lt;a href=&quot;x&quot; b=&#39;y&#39;&gt;&amp;\u{fffd}\u{fffd}"
        );
    }

    #[test]
    fn the_style_has_nothing_from_elsewhere() {
        assert!(!CSS.contains("url(") && !CSS.contains("@import") && !CSS.contains("</"));
    }
}
