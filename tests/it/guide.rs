//! docs/first-job.md, as it stands.

use crate::support::{Cli, Ledger, Template, TestDb, has_version};

fn block(text: &str, language: &str) -> String {
    let from = text.split(&format!("```{language}\n")).nth(1).unwrap_or_else(|| panic!("no {language} block"));
    from.split("```").next().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn the_first_job_of_the_documentation_works_as_it_stands() {
    if !has_version(15, "the daemon's login is a superuser there") {
        return;
    }
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/first-job.md");
    let page = std::fs::read_to_string(page).expect("readable");
    let db = TestDb::new(Template::Empty).await;
    let ledger = Ledger::new(&db).await;
    ledger.run("grant usage, create on schema public to app_owner").await;
    ledger.run(&block(&page, "sql")).await;
    let dir = tempfile::tempdir().expect("a directory");
    let job = dir.path().join("orders_region");
    std::fs::create_dir(&job).expect("writable");
    std::fs::write(job.join("job.toml"), block(&page, "toml")).expect("writable");
    let cli = Cli::new(&db).env("BACKFILLD_DATABASE__DEDICATED_LOGIN", "true");
    let mut ran = Vec::new();
    // The page's own commands, in its order; the directory is where this test put it.
    for line in page.lines().filter_map(|l| l.strip_prefix("    backfilld ")) {
        let words: Vec<String> = line
            .split_whitespace()
            .map(|w| match w {
                "orders_region" => job.display().to_string(),
                "." => dir.path().display().to_string(),
                other => other.to_owned(),
            })
            .collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        cli.run(&words).await.expect(0, "");
        ran.push(words[0].to_owned());
        if words[0] == "run" {
            let wrong = "select count(*) from public.orders o join public.customers c on c.id = o.customer_id
                where o.region is distinct from c.region";
            assert_eq!(ledger.number(wrong).await, 0);
            ledger.run("insert into public.orders (customer_id, total) values (1, 1)").await;
            assert_eq!(ledger.number(wrong).await, 0, "a later row is filled as well");
        }
    }
    assert!(ran.iter().any(|c| c == "run") && ran.iter().any(|c| c == "rollback"), "{ran:?}");
    let left = "select count(*) from information_schema.columns where table_name = 'orders' and column_name = 'region'";
    assert_eq!(ledger.number(left).await, 0);
}
