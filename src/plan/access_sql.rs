//! SQL of the access comparison: the policies of a probe role, and the attempts that are made under it. Pure.

use super::shape::Shape;
use super::steps::quote;
use crate::job::spec::{ForeignKey, Policy};
use crate::pg::ident::Ident;

/// The commands that policies are for, as `pg_policy.polcmd` writes them, with their keywords.
pub const COMMANDS: [(&str, &str); 4] = [("r", "select"), ("a", "insert"), ("w", "update"), ("d", "delete")];

/// Parts into which keys are sorted by hash when two sets of rows differ: of a million rows each has a thousand.
pub const BUCKETS: i64 = 1024;

/// A policy, wherever it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Its name.
    pub name: String,
    /// `r`, `a`, `w`, `d` or `*`.
    pub command: String,
    /// ORed with others, or ANDed.
    pub permissive: bool,
    /// For whom; `public` is everyone.
    pub roles: Vec<String>,
    /// USING.
    pub using: Option<String>,
    /// WITH CHECK.
    pub check: Option<String>,
}

impl From<&Policy> for Rule {
    fn from(p: &Policy) -> Self {
        Self {
            name: p.name.as_str().to_owned(),
            command: p.command.catalog_code().to_owned(),
            permissive: p.permissive,
            roles: p.roles.iter().map(|r| r.as_str().to_owned()).collect(),
            using: p.using.clone(),
            check: p.check.clone(),
        }
    }
}

impl Rule {
    /// Whether it is for this command.
    pub fn covers(&self, command: &str) -> bool {
        self.command == "*" || self.command == command
    }

    /// Whether it is for a role that has the rights of `has` (itself among them).
    pub fn applies(&self, has: &[String]) -> bool {
        self.roles.iter().any(|r| r == "public" || has.contains(r))
    }

    /// What decides about rows that are there.
    fn old_row(&self) -> String {
        self.using.clone().unwrap_or_else(|| "true".into())
    }

    /// What decides about rows that are written: without WITH CHECK it is USING.
    fn new_row(&self) -> String {
        self.check.clone().or_else(|| self.using.clone()).unwrap_or_else(|| "true".into())
    }
}

/// The condition under which `rules` (those that apply) let a row through for a command, as the server puts it together:
/// permissive ones ORed, restrictive ones ANDed. `written`: for rows that are written.
pub fn condition(rules: &[&Rule], command: &str, written: bool) -> String {
    let part = |r: &Rule| format!("({})", if written { r.new_row() } else { r.old_row() });
    let of = |permissive: bool| -> Vec<String> {
        rules.iter().filter(|r| r.permissive == permissive && r.covers(command)).map(|r| part(r)).collect()
    };
    let any = of(true);
    let mut all = vec![if any.is_empty() { "false".to_owned() } else { format!("({})", any.join(" or ")) }];
    all.extend(of(false));
    all.join(" and ")
}

/// The policies that make a probe role see just what `rules` allow, whatever else applies to it: one permissive policy that
/// allows everything, and a restrictive one per command with the condition of the rules. (Anything or everything) and the
/// rules is the rules. Gives names and statements.
pub fn probe_policies(target: &str, role: &str, rules: &[&Rule]) -> Vec<(String, String)> {
    let name = |suffix: &str| format!("{role}_{suffix}");
    let mut out = vec![(
        name("all"),
        format!(
            "create policy {} on {target} as permissive for all to {} using (true) with check (true)",
            quote(&name("all")),
            quote(role)
        ),
    )];
    for (code, keyword) in COMMANDS {
        let using = format!(" using ({})", condition(rules, code, false));
        let check = format!(" with check ({})", condition(rules, code, true));
        let clauses = match code {
            "a" => check,
            "w" => using + &check,
            _ => using,
        };
        out.push((
            name(keyword),
            format!(
                "create policy {} on {target} as restrictive for {keyword} to {}{clauses}",
                quote(&name(keyword)),
                quote(role)
            ),
        ));
    }
    out
}

/// Number of visible rows and a hash of their keys that does not depend on their order.
pub fn visible(shape: &Shape) -> String {
    format!("select count(*)::int8, coalesce(bit_xor(h), 0)::int8 from ({}) x", hashes(shape))
}

/// The same for each of [`BUCKETS`] parts.
pub fn visible_buckets(shape: &Shape) -> String {
    format!(
        "select (h & {})::int4, count(*)::int8, coalesce(bit_xor(h), 0)::int8 from ({}) x group by 1",
        BUCKETS - 1,
        hashes(shape)
    )
}

/// Keys of visible rows in the parts `$1`, at most `$2`.
pub fn visible_keys(shape: &Shape) -> String {
    format!(
        "select {} from {} as t where (hashtextextended({}, 0) & {})::int4 = any ($1::int4[]) limit $2",
        shape.key_as_text("t"),
        shape.target.sql(),
        shape.key_as_one_text("t"),
        BUCKETS - 1
    )
}

/// Whether a row with the key in the JSON object `$1` is visible.
pub fn is_visible(shape: &Shape) -> String {
    format!(
        "select count(*)::int8 from {} as t, {} where {}",
        shape.target.sql(),
        patch(shape),
        shape.key_equal("t", "p")
    )
}

fn hashes(shape: &Shape) -> String {
    format!("select hashtextextended({}, 0) as h from {} as t", shape.key_as_one_text("t"), shape.target.sql())
}

/// A record of the target's type from the JSON object `$1`, as FROM item `p`.
fn patch(shape: &Shape) -> String {
    format!("jsonb_populate_record(null::{}, $1::text::jsonb) as p", shape.target.sql())
}

/// Columns of the target to which the joins refer.
pub fn join_columns(shape: &Shape) -> Vec<Ident> {
    shape.ref_columns(crate::job::spec::TARGET_ALIAS)
}

fn owner(shape: &Shape) -> String {
    shape.columns.first().map_or_else(|| "null".into(), |c| format!("t.{}", c.name.sql()))
}

/// `t.owner = $n`, the parameter being text.
fn owner_is(shape: &Shape, parameter: usize, equal: bool) -> String {
    let Some(c) = shape.columns.first() else { return "false".into() };
    let operator = if equal { "=" } else { "is distinct from" };
    if c.as_text {
        return format!("{}::text {operator} ${parameter}::text", owner(shape));
    }
    format!("{} {operator} ${parameter}::text::{}", owner(shape), c.sql_type)
}

/// Per owner: rows, and where one of them is. For a range of pages.
pub fn owners(shape: &Shape, range: &str) -> String {
    format!(
        "select {0}::text, count(*)::int8, min(t.ctid)::text from {1} as t where {range} and {0} is not null group by 1",
        owner(shape),
        shape.target.sql()
    )
}

/// One row: key, owner, join columns, all as text; and the whole row as JSON. `$1`: where it is; `$2`: its owner.
pub fn row_at(shape: &Shape) -> String {
    format!("{} where t.ctid = $1::text::tid and {}", row(shape), owner_is(shape, 2, true))
}

/// One row of the owner `$1`, or with `equal = false` of somebody else.
pub fn row_of(shape: &Shape, equal: bool) -> String {
    format!("{} where {} and {} is not null limit 1", row(shape), owner_is(shape, 1, equal), owner(shape))
}

/// Owner of the row with the key in the JSON object `$1`, and the values of the other paths.
pub fn owner_of_key(shape: &Shape, others: &[String]) -> String {
    let others: String = others.iter().map(|select| format!(", ({select})::text")).collect();
    format!(
        "select {}::text{others} from {} as t, {} where {}",
        owner(shape),
        shape.target.sql(),
        patch(shape),
        shape.key_equal("t", "p")
    )
}

fn row(shape: &Shape) -> String {
    let list = |names: Vec<String>| format!("array[{}]::text[]", names.join(", "));
    let text = |c: &Ident| format!("t.{}::text", c.sql());
    format!(
        "select {}, {}::text, {}, to_jsonb(t)::text from {} as t",
        list(shape.key.iter().map(|k| text(&k.name)).collect()),
        owner(shape),
        list(join_columns(shape).iter().map(text).collect()),
        shape.target.sql()
    )
}

/// Inserts the row in `$1` with the changes in `$2`, both JSON objects.
pub fn insert(shape: &Shape, columns: &[Ident]) -> String {
    let list: Vec<String> = columns.iter().map(Ident::sql).collect();
    let values: Vec<String> = columns.iter().map(|c| format!("p.{}", c.sql())).collect();
    format!(
        "insert into {0} ({1}) overriding system value select {2} from jsonb_populate_record(null::{0}, \
         $1::text::jsonb || $2::text::jsonb) as p",
        shape.target.sql(),
        list.join(", "),
        values.join(", ")
    )
}

/// Sets `columns` of the row with the key in `$1` to the values there.
pub fn update(shape: &Shape, columns: &[Ident]) -> String {
    let set: Vec<String> = columns.iter().map(|c| format!("{0} = p.{0}", c.sql())).collect();
    format!(
        "update {} as t set {} from {} where {}",
        shape.target.sql(),
        set.join(", "),
        patch(shape),
        shape.key_equal("t", "p")
    )
}

/// Sets a column of the row with the key in `$1` to what it is.
pub fn touch(shape: &Shape, column: &Ident) -> String {
    format!(
        "update {} as t set {1} = t.{1} from {2} where {3}",
        shape.target.sql(),
        column.sql(),
        patch(shape),
        shape.key_equal("t", "p")
    )
}

/// Deletes the row with the key in `$1`.
pub fn delete(shape: &Shape) -> String {
    format!("delete from {} as t using {} where {}", shape.target.sql(), patch(shape), shape.key_equal("t", "p"))
}

/// Calls `call`, an expression over the row in `$1`.
pub fn call(shape: &Shape, call: &str) -> String {
    format!("select ({call})::text from jsonb_populate_record(null::{}, $1::text::jsonb) as t", shape.target.sql())
}

/// The least value of a column of a number type, less one.
pub fn below(shape: &Shape, column: &Ident) -> String {
    format!("select (coalesce(min(t.{0}), 0) - 1)::text from {1} as t", column.sql(), shape.target.sql())
}

/// Every value that the first column may have by its foreign key, as text.
pub fn referenced_values(shape: &Shape, keys: &[ForeignKey]) -> Option<String> {
    let column = shape.columns.first()?;
    let key = keys.iter().find(|k| k.columns.len() == 1 && k.columns[0] == column.name)?;
    let referenced = key.referenced_columns.first()?;
    Some(format!("select {}::text from {}", referenced.sql(), key.references.sql()))
}

/// The distinct values that a path gives, as text: from its first table on where that is enough.
pub fn distinct_values(path: &Shape) -> Option<String> {
    let value = path.columns.first()?;
    let first = path.joins.first()?;
    let needs_target = path.joins[1..].iter().any(|j| j.on.iter().any(|o| o.ref_alias.as_str() == "t"))
        || crate::job::lex::references(&value.value, &["t"]).map_or(true, |r| !r.is_empty());
    let from = if needs_target {
        format!("{} as t{}", path.target.sql(), path.join_tail())
    } else {
        let rest: String = path.joins[1..]
            .iter()
            .map(|j| format!("\n  {}", super::shape::join_sql(j, crate::job::spec::JoinKind::Left)))
            .collect();
        format!("{} as {}{rest}", first.table.sql(), first.alias.sql())
    };
    Some(format!("select distinct ({})::text from {from} where ({}) is not null", value.value, value.value))
}
