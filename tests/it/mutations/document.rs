//! docs/mutations.md is made from the tables.

use super::table::{By, Moment};

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/mutations.md");

const HEAD: &str = "\
# Planted defects

Whether a tool notices what is wrong shows when something is wrong. Each defect below is planted on the sample of the demo, in a
database of its own, and has to be caught by whom the table names; `make mutations` plants all of them. Where nothing is planted,
nobody may raise an alarm: those are the first rows.

Who catches: `check` before anything is changed; `verify`, which is also what the daemon does before it goes on; the comparison of
access before the flip and after it; the flip, which wants everything as it was proven; the watch, with `[watch]` in the job.
That rows hidden from its own login by row level security are an error and no clean result is tested beside these, since rights of
a login belong to the whole server.

";

/// The page.
fn page() -> String {
    let defects = || super::all().filter(|d| d.by != By::Harmless);
    let caught = defects().filter(|d| !matches!(d.by, By::Nobody(_))).count();
    let mut out = format!("{HEAD}{caught} of {} are caught.\n", defects().count());
    for moment in Moment::ALL {
        out.push_str(&format!("\n## {}\n\n| Defect | Caught by |\n|---|---|\n", moment.heading()));
        for d in super::all().filter(|d| d.moment == moment) {
            let by = if d.name.starts_with("nothing: ") { "no alarm".to_owned() } else { d.by.text() };
            out.push_str(&format!("| {} | {by} |\n", d.name.replace('|', "\\|")));
        }
    }
    out
}

#[test]
fn the_page_names_every_defect_and_who_catches_it() {
    let page = page();
    if std::env::var_os("BACKFILLD_TEST_BLESS").is_some() {
        std::fs::write(PATH, &page).expect("writable");
    }
    let there = std::fs::read_to_string(PATH).unwrap_or_default();
    assert_eq!(there, page, "BACKFILLD_TEST_BLESS=1 cargo test --test it -- mutations::document writes it");
}

#[test]
fn there_are_many_defects_and_each_has_a_name_of_its_own() {
    let mut names: Vec<(Moment, &str)> = super::all().map(|d| (d.moment, d.name)).collect();
    let n = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), n);
    assert!(super::all().filter(|d| !matches!(d.by, By::Harmless | By::Nobody(_))).count() >= 40);
}
