//! The walk of the proof: one chunk of pages at a time, each with a snapshot of its own, so that no long one holds back vacuum
//! or an index build (hazard 24).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio_postgres::{Client, Row};

use crate::error::{Error, Result};
use crate::job::JobSpec;
use crate::ledger::verdict::Verdict;
use crate::pg::ident::{Ident, literal};
use crate::plan::verify_sql::{self, AgreeShape, Finding, Unusable};
use crate::plan::{Facts, Shape};

/// Kind of the finding that counts source rows without a legal value.
pub const UNUSABLE_SOURCES: &str = "unusable_sources";
/// Kind of the finding that counts rows that lack their value.
pub const UNFILLED: &str = "unfilled";
/// Kind of the finding that counts rows with another value than their source.
pub const DRIFT: &str = "drift";

/// Fewest pages of a chunk.
const MIN_PAGES: u64 = 128;
/// A chunk that takes less is followed by one of twice its size, so that what each has to do first (hash the sources) counts less.
const SHORT: Duration = Duration::from_millis(250);
/// A chunk that takes longer is followed by one of half its size: a snapshot should not stay.
const LONG: Duration = Duration::from_secs(2);
/// How far chunks grow beyond what the job says.
const GROWTH: u64 = 8;
/// Above this share of groups among rows there is nothing to gain by grouping.
const WORTH_GROUPING: f64 = 0.7;
/// Session settings of whoever runs a proof. A chunk is bounded by its pages, not by time: on a cold, busy disk it may take
/// its time. Memory for the hash of a source of half a million rows. Workers are left to the application.
pub const SETTINGS: &str =
    "set statement_timeout = '10min'; set max_parallel_workers_per_gather = 0; set work_mem = '32MB'";

/// Everything the proof runs, rendered once.
#[derive(Debug, Clone)]
pub struct Proof {
    from: String,
    findings: Vec<Finding>,
    shape: Shape,
    agree: Vec<AgreeShape>,
    spec: JobSpec,
    groups: Option<Vec<Ident>>,
    unusable: Option<Unusable>,
}

/// Numbers by kind.
pub type Counts = BTreeMap<String, i64>;
/// Keys by kind.
pub type Keys = BTreeMap<String, Vec<Vec<String>>>;

/// Which tables a walk is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// The target.
    Target,
    /// The first source: rows that would give a new target row no legal value.
    Sources,
    /// Everything is looked at.
    Done,
}

/// Where a proof is, and what it found so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Walk {
    /// Which tables it is in.
    pub part: Part,
    /// What is left of the part: the table, or the leaves of a partitioned one.
    relations: Vec<String>,
    /// The next page of the first of them.
    pub page: u64,
    /// The file whose pages are counted.
    filenode: u32,
    /// Pages of the next chunk.
    chunk: u64,
    grouped: bool,
    /// Target rows looked at.
    pub rows_checked: i64,
    /// Rows found wrong, by kind.
    counts: Counts,
    /// Keys of some of them.
    samples: Keys,
    elapsed_ms: i64,
}

impl Proof {
    /// Renders the proof of a job.
    pub fn new(spec: &JobSpec, facts: &Facts) -> Self {
        let agree: Vec<_> =
            spec.agree.iter().zip(&facts.agree).map(|(a, shape)| verify_sql::agree_shape(a, shape)).collect();
        let unusable = (!spec.side_effects.source_may_lack_value)
            .then(|| verify_sql::unusable(&facts.shape, &spec.foreign_keys))
            .flatten();
        let type_of =
            |name: &Ident| facts.target.columns.iter().find(|c| c.name == name.as_str()).map(|c| c.sql_type.as_str());
        Self {
            from: verify_sql::from(&facts.shape, &spec.foreign_keys, &agree),
            findings: verify_sql::findings(&facts.shape, &spec.foreign_keys, &agree),
            groups: verify_sql::groups(&facts.shape, &facts.agree, &spec.foreign_keys, type_of),
            shape: facts.shape.clone(),
            agree,
            spec: spec.clone(),
            unusable,
        }
    }

    /// Leaves rows out that an operator accepted without a value. They have keys, so rows are not looked at by groups then.
    #[must_use]
    pub fn accepting(mut self) -> Self {
        let keys: Vec<String> = self.shape.key.iter().map(|k| format!("t.{}::text", k.name.sql())).collect();
        let accepted = format!(
            "not exists (select from backfilld.quarantine as \"Q\" where \"Q\".job = {} and \"Q\".accepted_at is not null \
             and \"Q\".key = array[{}])",
            literal(&self.shape.job),
            keys.join(", ")
        );
        // The value of such a row may be one that cannot be computed: it is not tried.
        for finding in self.findings.iter_mut().filter(|f| f.kind == UNFILLED || f.kind.starts_with("agree:")) {
            finding.condition = format!("case when {accepted} then {} end", finding.condition);
        }
        self.groups = None;
        self
    }

    /// Runs it to its end. `between` is called between chunks with rows checked so far; it may stop the proof. Reads only, so
    /// it also works on a standby.
    ///
    /// # Errors
    /// Database errors, and what `between` returns.
    pub async fn run(&self, client: &Client, mut between: impl AsyncFnMut(i64) -> Result<()>) -> Result<Verdict> {
        let mut walk = self.begin();
        while walk.part != Part::Done {
            between(walk.rows_checked).await?;
            self.step(client, &mut walk).await?;
        }
        let mut v = self.verdict(walk);
        v.add(super::SYNC, super::sync::broken(client, &self.shape).await?);
        Ok(v)
    }

    /// A walk from the first page.
    pub fn begin(&self) -> Walk {
        Walk {
            part: Part::Target,
            relations: vec![self.shape.target.sql()],
            page: 0,
            filenode: 0,
            chunk: u64::from(self.spec.verification.chunk_pages),
            grouped: true,
            rows_checked: 0,
            counts: self.findings.iter().map(|f| (f.kind.clone(), 0)).collect(),
            samples: BTreeMap::new(),
            elapsed_ms: 0,
        }
    }

    /// What a walk found.
    pub fn verdict(&self, walk: Walk) -> Verdict {
        let mut v = Verdict {
            passed: false,
            rows_checked: walk.rows_checked,
            counts: walk.counts,
            samples: walk.samples,
            duration_ms: walk.elapsed_ms,
        };
        v.passed = v.findings() == 0;
        v
    }

    /// Looks at the next chunk. A table that was rewritten since the last one is begun anew.
    ///
    /// # Errors
    /// Database errors; the walk stands where it was.
    pub async fn step(&self, client: &Client, walk: &mut Walk) -> Result<()> {
        let began = Instant::now();
        match (walk.part, &self.unusable) {
            (Part::Target, _) => self.target(client, walk).await?,
            (Part::Sources, Some(unusable)) => self.sources(client, walk, unusable).await?,
            (Part::Sources, None) | (Part::Done, _) => walk.part = Part::Done,
        }
        walk.took(began.elapsed(), u64::from(self.spec.verification.chunk_pages));
        if walk.relations.is_empty() {
            self.next_part(client, walk).await?;
        }
        Ok(())
    }

    async fn next_part(&self, client: &Client, walk: &mut Walk) -> Result<()> {
        walk.part = Part::Done;
        walk.page = 0;
        let Some(unusable) = self.unusable.as_ref().filter(|_| !walk.counts.contains_key(UNUSABLE_SOURCES)) else {
            return Ok(());
        };
        let rows = client
            .query(
                "select format('%I.%I', n.nspname, c.relname) from pg_partition_tree(to_regclass($1)) p
                 join pg_class c on c.oid = p.relid join pg_namespace n on n.oid = c.relnamespace where p.isleaf order by c.oid",
                &[&unusable.table.sql()],
            )
            .await?;
        walk.part = Part::Sources;
        walk.relations = rows.iter().map(|r| r.get(0)).collect();
        if walk.relations.is_empty() {
            walk.relations.push(unusable.table.sql());
        }
        walk.counts.insert(UNUSABLE_SOURCES.into(), 0);
        Ok(())
    }

    async fn target(&self, client: &Client, walk: &mut Walk) -> Result<()> {
        let (low, high) = (walk.page, walk.page + walk.chunk);
        let range = verify_sql::page_range(low, Some(high));
        let keys = &self.spec.foreign_keys;
        let groups = self.groups.as_ref().filter(|_| walk.grouped);
        let sql = match groups {
            Some(columns) => verify_sql::count_groups(&self.shape, keys, &self.agree, columns, &self.findings, &range),
            None => verify_sql::count(&self.from, &self.findings, &range),
        };
        let Some(row) = chunk(client, walk, &sql).await? else {
            self.restart(walk);
            return Ok(());
        };
        let rows: i64 = row.get(0);
        if groups.is_some() {
            let groups: i64 = row.get(self.findings.len() + 1);
            walk.grouped = rows < 1000 || (groups as f64) < WORTH_GROUPING * rows as f64;
        }
        for (i, finding) in self.findings.iter().enumerate() {
            let n: i64 = row.get(i + 1);
            let room = self.room(walk, &finding.kind);
            if n > 0 && room > 0 {
                let sql = verify_sql::sample(&self.shape, &self.from, finding, &range, room);
                let keys = client.query(&sql, &[]).await?;
                walk.samples.entry(finding.kind.clone()).or_default().extend(keys.iter().map(key));
            }
            *walk.counts.entry(finding.kind.clone()).or_default() += n;
        }
        walk.rows_checked += rows;
        walk.behind(high, &row);
        Ok(())
    }

    async fn sources(&self, client: &Client, walk: &mut Walk, unusable: &Unusable) -> Result<()> {
        let Some(relation) = walk.relations.first().cloned() else { return Ok(()) };
        let (low, high) = (walk.page, walk.page + walk.chunk);
        let about = |e: Error| e.context(format!("looking for rows of {relation} without a legal value"));
        let sql = unusable.count(&relation, low, high);
        let Some(row) = chunk(client, walk, &sql).await.map_err(about)? else {
            // The counts of the pages before stay: at worst a row is counted twice.
            walk.page = 0;
            return Ok(());
        };
        let n: i64 = row.get(1);
        let room = self.room(walk, UNUSABLE_SOURCES);
        if n > 0 && room > 0 {
            let keys = client.query(&unusable.sample(&relation, low, high, room), &[]).await?;
            walk.samples.entry(UNUSABLE_SOURCES.into()).or_default().extend(keys.iter().map(key));
        }
        *walk.counts.entry(UNUSABLE_SOURCES.into()).or_default() += n;
        walk.behind(high, &row);
        Ok(())
    }

    /// Compares the rows of some pages of the target: numbers and keys by kind.
    ///
    /// # Errors
    /// Database errors.
    pub async fn look(&self, client: &Client, low: u64, high: u64) -> Result<(Counts, Keys)> {
        let mut walk = self.begin();
        (walk.page, walk.chunk, walk.filenode) = (low, high - low, 0);
        self.target(client, &mut walk).await?;
        Ok((walk.counts, walk.samples))
    }

    /// Keys, as text, of the rows of some pages whose value another look at their source would mend.
    pub fn repairable(&self, low: u64, high: u64) -> String {
        let wrong: Vec<String> = self
            .findings
            .iter()
            .filter(|f| [UNFILLED, DRIFT].contains(&f.kind.as_str()))
            .map(|f| format!("({})", f.condition))
            .collect();
        let all = Finding { kind: "repairable".into(), condition: wrong.join(" or ") };
        verify_sql::keys(&self.shape, &self.from, &all, &verify_sql::page_range(low, Some(high)))
    }

    fn room(&self, walk: &Walk, kind: &str) -> u32 {
        self.spec.verification.sample.saturating_sub(walk.samples.get(kind).map_or(0, Vec::len) as u32)
    }

    fn restart(&self, walk: &mut Walk) {
        *walk = Walk { elapsed_ms: walk.elapsed_ms, ..self.begin() };
    }
}

impl Walk {
    /// A chunk was cancelled: the next one is half as large. Gives whether there is a smaller one.
    pub fn smaller(&mut self) -> bool {
        let possible = self.chunk > MIN_PAGES;
        self.chunk = (self.chunk / 2).max(MIN_PAGES);
        possible
    }

    /// Target pages that a walk in the target has behind it, for people.
    pub fn place(&self) -> String {
        match self.part {
            Part::Target => format!("page {}", self.page),
            Part::Sources => "the sources".into(),
            Part::Done => "its end".into(),
        }
    }

    fn took(&mut self, took: Duration, first: u64) {
        self.elapsed_ms += took.as_millis() as i64;
        if took < SHORT {
            self.chunk = (self.chunk * 2).min(first.max(MIN_PAGES) * GROWTH);
        } else if took > LONG {
            self.smaller();
        }
    }

    /// The chunk up to `high` is done; the row of [`chunk`] ends with the number of pages.
    fn behind(&mut self, high: u64, row: &Row) {
        let pages: i64 = row.get(row.len() - 1);
        self.page = high;
        if high >= pages.unsigned_abs() {
            self.relations.remove(0);
            self.page = 0;
        }
    }
}

/// Runs the query of a chunk. Its row is followed by the file node and the number of pages, as they are while the query holds
/// its lock on the table. `None`: the pages are of another file than those before.
async fn chunk(client: &Client, walk: &mut Walk, sql: &str) -> Result<Option<Row>> {
    let Some(relation) = walk.relations.first() else { return Err(Error::internal("nothing is left to verify")) };
    let sql = format!(
        "select s.*, pg_relation_filenode(to_regclass($1)), \
         pg_relation_size(to_regclass($1)) / current_setting('block_size')::int8 from ({sql}) as s"
    );
    let row = client.query_one(&sql, &[relation]).await?;
    let filenode: u32 = row.get(row.len() - 2);
    if walk.page > 0 && walk.filenode > 0 && filenode != walk.filenode {
        return Ok(None);
    }
    walk.filenode = filenode;
    Ok(Some(row))
}

fn key(row: &Row) -> Vec<String> {
    (0..row.len()).map(|i| row.get(i)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(chunk: u64) -> Walk {
        Walk {
            part: Part::Target,
            relations: vec!["t".into()],
            page: 0,
            filenode: 1,
            chunk,
            grouped: true,
            rows_checked: 0,
            counts: BTreeMap::new(),
            samples: BTreeMap::new(),
            elapsed_ms: 0,
        }
    }

    #[test]
    fn chunks_grow_while_they_are_short_and_shrink_when_they_are_long() {
        let mut w = walk(4096);
        for _ in 0..9 {
            w.took(Duration::from_millis(50), 4096);
        }
        assert_eq!(w.chunk, 4096 * GROWTH);
        w.took(Duration::from_secs(1), 4096);
        assert_eq!(w.chunk, 4096 * GROWTH);
        w.took(Duration::from_secs(3), 4096);
        assert_eq!(w.chunk, 4096 * GROWTH / 2);
        let mut least = walk(200);
        assert!(least.smaller() && !least.smaller());
        assert_eq!(least.chunk, MIN_PAGES);
    }

    #[test]
    fn a_walk_survives_the_ledger() {
        let w = walk(77);
        let json = serde_json::to_value(&w).expect("json");
        assert_eq!(serde_json::from_value::<Walk>(json).expect("walk"), w);
    }
}
