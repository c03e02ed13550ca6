//! What the SQL renderers need to know of a job and its tables: names, joins, dependencies. Pure.

use std::collections::BTreeSet;

use crate::job::lex;
use crate::job::spec::{JoinKind, TARGET_ALIAS};
use crate::pg::ident::{Ident, QualifiedName, literal};

/// Schema of the sync triggers' functions. It belongs to the owner of the target, so that the triggers outlive us.
pub const SYNC_SCHEMA: &str = "backfilld_sync";

/// Prefix of our triggers. BEFORE triggers fire in the byte order of their names, and ours must come last (hazard 12).
pub const TRIGGER_PREFIX: &str = "zzz_backfilld_";

/// The search path under which every expression of a job is evaluated, everywhere (hazard 46).
pub const SEARCH_PATH: &str = "pg_catalog, pg_temp";

/// A job's tables as the SQL renderers see them.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// Name of the job.
    pub job: String,
    /// The target.
    pub target: QualifiedName,
    /// The key by which rows are walked and named; unique and NOT NULL.
    pub key: Vec<KeyColumn>,
    /// The joins to the value.
    pub joins: Vec<JoinShape>,
    /// The columns to fill.
    pub columns: Vec<ColumnShape>,
    /// A login of which batches are exempt from the UPDATE trigger, since nobody else uses it (I1).
    pub exempt_login: Option<String>,
    /// Columns, as (alias, column), whose type has no equality operator: they are compared as text.
    pub no_equality: BTreeSet<(String, String)>,
}

/// A key column.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyColumn {
    /// Its name.
    pub name: Ident,
    /// Its type as `format_type` writes it.
    pub sql_type: String,
    /// Schema of the operators that order it. Anything but `pg_catalog` (citext) has to be named in every comparison, or
    /// the comparison would go by another order than ORDER BY, and a walk would skip rows (hazard 20).
    pub operators: Ident,
}

/// A join.
#[derive(Debug, Clone, PartialEq)]
pub struct JoinShape {
    /// The alias.
    pub alias: Ident,
    /// The table.
    pub table: QualifiedName,
    /// Its equalities.
    pub on: Vec<OnShape>,
    /// Inner or left.
    pub kind: JoinKind,
    /// Whether a validated foreign key guarantees that the row exists as long as something refers to it. Then rows need
    /// not be watched for appearing and vanishing.
    pub covered: bool,
    /// That foreign key is NO ACTION, which looks at the end of the statement, or of the transaction: the row may be
    /// deleted and inserted again with another value.
    pub replaceable: bool,
    /// Keys and references are of the same types and these have hash functions, so that the place of a missing row can
    /// be locked by itself. Otherwise all missing rows of this join share one place.
    pub hashable: bool,
}

/// `alias.column = reference`.
#[derive(Debug, Clone, PartialEq)]
pub struct OnShape {
    /// Column of the joined table.
    pub column: Ident,
    /// Alias it refers to.
    pub ref_alias: Ident,
    /// Column it refers to.
    pub ref_column: Ident,
    /// The equality operator of the column's unique index, schema-qualified: under our search path a bare `=` on citext
    /// would compare as text.
    pub operator: String,
}

/// A column to fill.
#[derive(Debug, Clone, PartialEq)]
pub struct ColumnShape {
    /// Its name.
    pub name: Ident,
    /// Its type, as in `create table`.
    pub sql_type: String,
    /// The value.
    pub value: String,
    /// NOT NULL wanted.
    pub not_null: bool,
    /// Whether the value may be NULL as far as the catalog says. Then NULL is no proof that nobody has been there.
    pub nullable: bool,
    /// The type has no equality operator (json, xml, point): compare its text.
    pub as_text: bool,
    /// The value is of another type, or of the same with other limits (`varchar(10)`): assigning it converts, which can
    /// raise. The type without limits, to which a cast is like the assignment except for these.
    pub converts_to: Option<String>,
}

impl OnShape {
    /// The equality in SQL.
    pub fn sql(&self, alias: &Ident) -> String {
        self.against(alias, &format!("{}.{}", self.ref_alias.sql(), self.ref_column.sql()))
    }

    /// The equality with `value` in place of the reference.
    pub fn against(&self, alias: &Ident, value: &str) -> String {
        format!("{}.{} {} {value}", alias.sql(), self.column.sql(), self.operator)
    }
}

impl ColumnShape {
    /// Whether deriving the value can raise an error, or depend on the session's settings: everything may but a choice
    /// between columns of the same type.
    pub fn may_raise(&self) -> bool {
        self.converts_to.is_some() || !lex::only_chooses(&self.value)
    }

    /// The value in an expression that, unlike an assignment, has to have the column's type.
    pub fn typed_value(&self) -> String {
        match &self.converts_to {
            Some(sql_type) => format!("({})::{sql_type}", self.value),
            None => format!("({})", self.value),
        }
    }

    /// `stored is distinct from value`, with the value brought to the column's type first, so that rounding on
    /// assignment is no difference.
    pub fn differs(&self, stored: &str, value: &str) -> String {
        if self.as_text {
            format!("({stored})::text is distinct from ({value})::{}::text", self.sql_type)
        } else {
            format!("{stored} is distinct from ({value})::{}", self.sql_type)
        }
    }
}

impl Shape {
    /// Columns of the table behind `alias` on which the values depend: those in expressions and in joins.
    pub fn reads(&self, alias: &str) -> Vec<Ident> {
        let mut out: BTreeSet<Ident> = BTreeSet::new();
        let aliases: Vec<&str> = self.aliases();
        for column in &self.columns {
            for reference in lex::references(&column.value, &aliases).unwrap_or_default() {
                if reference.alias == alias
                    && let Ok(name) = Ident::new(reference.column)
                {
                    out.insert(name);
                }
            }
        }
        for join in &self.joins {
            for on in &join.on {
                if on.ref_alias.as_str() == alias {
                    out.insert(on.ref_column.clone());
                }
                if join.alias.as_str() == alias {
                    out.insert(on.column.clone());
                }
            }
        }
        out.into_iter().collect()
    }

    /// `t` and the aliases of the joins.
    pub fn aliases(&self) -> Vec<&str> {
        std::iter::once(TARGET_ALIAS).chain(self.joins.iter().map(|j| j.alias.as_str())).collect()
    }

    /// Columns of `alias` to which later joins refer.
    pub fn ref_columns(&self, alias: &str) -> Vec<Ident> {
        let found: BTreeSet<Ident> = self
            .joins
            .iter()
            .flat_map(|j| &j.on)
            .filter(|on| on.ref_alias.as_str() == alias)
            .map(|on| on.ref_column.clone())
            .collect();
        found.into_iter().collect()
    }

    /// The joins that lead from the target to the references of join `k`, in order, `k` itself left out.
    pub fn path_to(&self, k: usize) -> Vec<&JoinShape> {
        let mut wanted: BTreeSet<&str> = self.joins[k].on.iter().map(|on| on.ref_alias.as_str()).collect();
        let mut out = Vec::new();
        for join in self.joins[..k].iter().rev() {
            if wanted.contains(join.alias.as_str()) {
                wanted.extend(join.on.iter().map(|on| on.ref_alias.as_str()));
                out.push(join);
            }
        }
        out.reverse();
        out
    }

    /// The joins as a FROM tail: each on a line of its own, in the job's order and kinds.
    pub fn join_tail(&self) -> String {
        self.joins.iter().map(|j| format!("\n  {}", join_sql(j, j.kind))).collect()
    }

    /// As [`Self::join_tail`] with every join a LEFT JOIN, for statements that must keep target rows without value.
    pub fn left_join_tail(&self) -> String {
        self.joins.iter().map(|j| format!("\n  {}", join_sql(j, JoinKind::Left))).collect()
    }

    /// The value over [`Self::left_join_tail`]: NULL where a row of an inner join is missing.
    pub fn left_value(&self, column: &ColumnShape) -> String {
        let present: Vec<String> = self
            .joins
            .iter()
            .filter(|j| j.kind == JoinKind::Inner)
            .filter_map(|j| j.on.first().map(|on| format!("{}.{} is not null", j.alias.sql(), on.column.sql())))
            .collect();
        // A bare reference to the only join's column is NULL by itself then.
        let own = |r: lex::Reference| r.alias != TARGET_ALIAS && self.joins.len() == 1;
        if present.is_empty() || lex::plain_reference(&column.value).is_some_and(own) {
            return format!("({})", column.value);
        }
        format!("(case when {} then ({}) end)", present.join(" and "), column.value)
    }

    /// A one-row FROM item `t` with the target's columns that matter, taken from `row` (`new`, `old`, or an outer `t`).
    pub fn row_as_target(&self, row: &str) -> String {
        let columns: Vec<String> =
            self.reads(TARGET_ALIAS).iter().map(|c| format!("{row}.{} as {}", c.sql(), c.sql())).collect();
        format!("(select {}) as \"t\"", columns.join(", "))
    }

    /// The scalar or row subselect that derives `columns` for one target row; `into` is PL/pgSQL's clause.
    pub fn derive_select<'a>(
        &self,
        row: &str,
        columns: impl IntoIterator<Item = &'a ColumnShape>,
        into: Option<&[String]>,
    ) -> String {
        let values: Vec<String> = columns.into_iter().map(|c| format!("({})", c.value)).collect();
        let into = into.map_or(String::new(), |names| format!("\n  into {}", names.join(", ")));
        format!("select {}{into}\n  from {}{}", values.join(", "), self.row_as_target(row), self.join_tail())
    }

    /// The value of one column as a scalar subselect over an outer row.
    pub fn scalar(&self, column: &ColumnShape, row: &str) -> String {
        format!("(select ({}) from {}{})", column.value, self.row_as_target(row), self.join_tail())
    }

    /// `"a", "b"` of the key.
    pub fn key_list(&self) -> String {
        self.key.iter().map(|k| k.name.sql()).collect::<Vec<_>>().join(", ")
    }

    /// `x."a", x."b"` of the key.
    pub fn key_of(&self, row: &str) -> String {
        self.key.iter().map(|k| format!("{row}.{}", k.name.sql())).collect::<Vec<_>>().join(", ")
    }

    /// The key as text columns, the form in which checkpoints and findings keep it.
    pub fn key_as_text(&self, row: &str) -> String {
        self.key.iter().map(|k| format!("{row}.{}::text", k.name.sql())).collect::<Vec<_>>().join(", ")
    }

    /// `a = b` for every key column, between two rows.
    pub fn key_equal(&self, a: &str, b: &str) -> String {
        let equal = |k: &KeyColumn| format!("{a}.{0} {1} {b}.{0}", k.name.sql(), k.operator("="));
        self.key.iter().map(equal).collect::<Vec<_>>().join(" and ")
    }

    /// `x."a"::text`, several joined by a unit separator: the key as one text, for hashing.
    pub fn key_as_one_text(&self, row: &str) -> String {
        let parts: Vec<String> = self.key.iter().map(|k| format!("{row}.{}::text", k.name.sql())).collect();
        parts.join(" || chr(31) || ")
    }

    /// Whether the key of `t` is beyond (`>`) or up to (`<=`) the key in the parameters from number `first` on, in the
    /// order of ORDER BY. Parameters are text, cast to the key's types: `$1::text::uuid`.
    pub fn key_is(&self, comparison: &str, first: usize) -> String {
        let parameter = |i: usize, k: &KeyColumn| format!("${}::text::{}", first + i, k.sql_type);
        if self.key.iter().all(|k| k.operators.as_str() == "pg_catalog") {
            let values: Vec<String> = self.key.iter().enumerate().map(|(i, k)| parameter(i, k)).collect();
            return format!("({}) {comparison} ({})", self.key_of("t"), values.join(", "));
        }
        // A row comparison has one operator for all its columns, so it is spelled out.
        let strict = &comparison[..1];
        let mut out = String::new();
        for (i, k) in self.key.iter().enumerate().rev() {
            let compare = |op: &str| format!("t.{} {} {}", k.name.sql(), k.operator(op), parameter(i, k));
            out = match out.is_empty() {
                true => compare(comparison),
                false => format!("({} or ({} and {out}))", compare(strict), compare("=")),
            };
        }
        out
    }

    /// The key of `t` is the one in the parameters from number `first` on; as [`Self::key_is`].
    pub fn key_at(&self, first: usize) -> String {
        let one = |(i, k): (usize, &KeyColumn)| {
            format!("t.{} {} ${}::text::{}", k.name.sql(), k.operator("="), first + i, k.sql_type)
        };
        self.key.iter().enumerate().map(one).collect::<Vec<_>>().join(" and ")
    }

    /// FROM item `"K"` of the keys in text arrays, one parameter for each column from number 1 on, and the condition that `t`
    /// has one of them.
    pub fn keys_in(&self) -> (String, String) {
        let n = self.key.len();
        let arrays: Vec<String> = (1..=n).map(|i| format!("${i}::text[]")).collect();
        let names: Vec<String> = (1..=n).map(|i| format!("k{i}")).collect();
        let on: Vec<String> = self
            .key
            .iter()
            .zip(&names)
            .map(|(k, name)| format!("t.{} {} \"K\".{name}::{}", k.name.sql(), k.operator("="), k.sql_type))
            .collect();
        (format!("unnest({}) as \"K\"({})", arrays.join(", "), names.join(", ")), on.join(" and "))
    }

    /// Whether every statement may use the one-statement batch: NULL can only mean "not yet filled" (I2).
    pub fn null_is_marker(&self) -> bool {
        self.columns.iter().all(|c| !c.nullable)
    }

    /// Qualified name of one of our functions.
    pub fn function(&self, suffix: &str) -> String {
        format!("\"{SYNC_SCHEMA}\".\"{}_{suffix}\"", self.job)
    }

    /// Name of one of our triggers, unquoted.
    pub fn trigger(&self, suffix: &str) -> String {
        format!("{TRIGGER_PREFIX}{}_{suffix}", self.job)
    }

    /// The condition under which the UPDATE trigger need not fire: our own batch, a login nobody else uses, NULL to value,
    /// nothing else that matters changed. `None`: there is no exemption.
    pub fn exemption(&self) -> Option<String> {
        let login = self.exempt_login.as_deref()?;
        let mut all = vec![format!("session_user = {}", literal(login))];
        for column in &self.columns {
            let same = self.same(TARGET_ALIAS, &column.name, "old", "new");
            all.push(format!("(old.{} is null or {same})", column.name.sql()));
            all.push(format!("(new.{0} is not null or old.{0} is null)", column.name.sql()));
        }
        let any_filled: Vec<String> =
            self.columns.iter().map(|c| format!("(old.{0} is null and new.{0} is not null)", c.name.sql())).collect();
        all.push(format!("({})", any_filled.join(" or ")));
        let mut fixed: Vec<Ident> = self.reads(TARGET_ALIAS);
        fixed.extend(self.key.iter().map(|k| k.name.clone()));
        fixed.sort();
        fixed.dedup();
        for column in fixed {
            all.push(format!("not {}", self.changed(TARGET_ALIAS, &column)));
        }
        Some(all.join(" and "))
    }

    /// Whether two rows of the table behind `alias` are the same in `column`.
    pub fn same(&self, alias: &str, column: &Ident, a: &str, b: &str) -> String {
        let cast = self.equality_cast(alias, column);
        format!("{a}.{0}{cast} is not distinct from {b}.{0}{cast}", column.sql())
    }

    /// `old.column is distinct from new.column` for a column of the table behind `alias`.
    pub fn changed(&self, alias: &str, column: &Ident) -> String {
        let cast = self.equality_cast(alias, column);
        format!("(old.{0}{cast} is distinct from new.{0}{cast})", column.sql())
    }

    fn equality_cast(&self, alias: &str, column: &Ident) -> &'static str {
        let filled = self.columns.iter().any(|c| alias == TARGET_ALIAS && c.name == *column && c.as_text);
        let known = self.no_equality.contains(&(alias.to_owned(), column.as_str().to_owned()));
        if filled || known { "::text" } else { "" }
    }
}

impl KeyColumn {
    fn operator(&self, op: &str) -> String {
        match self.operators.as_str() {
            "pg_catalog" => op.to_owned(),
            _ => format!("operator({}.{op})", self.operators.sql()),
        }
    }
}

/// `[left] join table as alias on ...`.
pub fn join_sql(join: &JoinShape, kind: JoinKind) -> String {
    let on: Vec<String> = join.on.iter().map(|on| on.sql(&join.alias)).collect();
    let keyword = if kind == JoinKind::Left { "left join" } else { "join" };
    format!("{keyword} {} as {} on {}", join.table.sql(), join.alias.sql(), on.join(" and "))
}
