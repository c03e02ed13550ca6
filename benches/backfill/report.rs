//! Tables for people, JSON for machines.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use backfilld::{Error, Result};
use serde_json::{Value, json};

use crate::world::{BINARY, World};

pub struct Report {
    about: Value,
    tables: Vec<Table>,
    data: serde_json::Map<String, Value>,
    charts: Vec<(&'static str, String)>,
}

/// At most 80 columns: a label of 30, and 10 for each of five values.
pub struct Table {
    pub title: &'static str,
    pub head: Vec<&'static str>,
    pub rows: Vec<(String, Vec<String>)>,
}

impl Report {
    pub fn new(world: &World, settings: &[(&str, &str)]) -> Result<Self> {
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
        let about = json!({
            "rows": world.rows,
            "server": world.server_version()?,
            "settings": settings.iter().copied().collect::<HashMap<_, _>>(),
            "cores": std::thread::available_parallelism().map_or(0, usize::from),
            "cpu": model,
            "version": env!("CARGO_PKG_VERSION"),
        });
        Ok(Self { about, tables: Vec::new(), data: serde_json::Map::new(), charts: Vec::new() })
    }

    /// `data`: the same with every single run.
    pub fn add(&mut self, section: &str, table: Table, data: Value) {
        self.tables.push(table);
        self.data.insert(section.to_owned(), data);
    }

    /// A chart as SVG; docs/ has those of the numbers that it shows.
    pub fn chart(&mut self, name: &'static str, svg: String) {
        self.charts.push((name, svg));
    }

    /// Writes target/bench/backfill.json, and the charts beside it.
    pub fn write(&self) -> Result<PathBuf> {
        let target = Path::new(BINARY).ancestors().nth(2).unwrap_or(Path::new("."));
        let dir = target.join("bench");
        let path = dir.join("backfill.json");
        let mut all = self.data.clone();
        all.insert("about".to_owned(), self.about.clone());
        let text = serde_json::to_string_pretty(&all).unwrap_or_default();
        std::fs::create_dir_all(&dir)
            .and_then(|()| std::fs::write(&path, text + "\n"))
            .and_then(|()| {
                self.charts.iter().try_for_each(|(name, svg)| std::fs::write(dir.join(name).with_extension("svg"), svg))
            })
            .map_err(|e| Error::internal(format!("cannot write {}", path.display())).with_source(e))?;
        Ok(path)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let a = &self.about;
        let text = |v: &Value| v.as_str().unwrap_or("unknown").to_owned();
        write!(f, "{} rows, PostgreSQL {}, {} cores, {}", a["rows"], text(&a["server"]), a["cores"], text(&a["cpu"]))?;
        for table in &self.tables {
            write!(f, "\n\n{:<30}", table.title)?;
            table.head.iter().try_for_each(|h| write!(f, "{h:>10}"))?;
            for (label, cells) in &table.rows {
                write!(f, "\n  {label:<28}")?;
                cells.iter().try_for_each(|c| write!(f, "{c:>10}"))?;
            }
        }
        Ok(())
    }
}

/// The middle one of an odd number of values, the upper middle one of an even number.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

pub fn max(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NAN, f64::max)
}
