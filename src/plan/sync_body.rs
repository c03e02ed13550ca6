//! Bodies of the sync triggers' functions, in PL/pgSQL. [`super::sync_sql`] says which triggers call them.

use super::shape::{ColumnShape, JoinShape, Shape, join_sql};
use crate::job::spec::{JoinKind, TARGET_ALIAS};
use crate::pg::ident::literal;

/// Whether the transaction reads by one snapshot from its first statement on. READ UNCOMMITTED is READ COMMITTED.
pub const STRICT: &str = "current_setting('transaction_isolation') not in ('read committed', 'read uncommitted')";

/// An expression that raises must not break the application's write (hazard 73). What is not the value's fault passes: a
/// serialization failure or deadlock (40), a full disk or no memory (53), a lock that cannot be had (55), a cancelled
/// statement (57), the system's own errors (58, XX). `others` leaves out assertions.
const RAISED: &str = "exception when others or assert_failure then\n    \
     if left(sqlstate, 2) in ('40', '53', '55', '57', '58', 'XX') then raise; end if;";

/// BEFORE INSERT, BEFORE UPDATE on the target: the value by a plain read, whatever was sent.
pub fn derive(shape: &Shape) -> String {
    let into: Vec<String> = shape.columns.iter().map(|c| format!("new.{}", c.name.sql())).collect();
    // The message could hold row values, so only the code is logged; NULL is what the verifier finds.
    let log = format!(
        "\n    raise log 'backfilld job %: the value could not be derived (SQLSTATE %)', {}, sqlstate;",
        literal(&shape.job)
    );
    format!("begin\n{}  return new;\nend", assign(shape, &into, &log))
}

/// Derives the columns of `new` into the given variables. A column whose value raises becomes NULL; the others do not.
fn assign(shape: &Shape, into: &[String], log: &str) -> String {
    let all = || shape.columns.iter().zip(into);
    let mut out = String::new();
    let safe: Vec<String> = all().filter(|(c, _)| !c.may_raise()).map(|(_, v)| v.clone()).collect();
    if !safe.is_empty() {
        let columns = shape.columns.iter().filter(|c| !c.may_raise());
        out.push_str(&format!("  {};\n", shape.derive_select("new", columns, Some(&safe))));
    }
    for (column, variable) in all().filter(|(c, _)| c.may_raise()) {
        let select = shape.derive_select("new", [column], Some(std::slice::from_ref(variable)));
        out.push_str(&format!("  begin\n  {select};\n  {RAISED}\n    {variable} := null;{log}\n  end;\n"));
    }
    out
}

/// Deferred, AFTER INSERT and UPDATE on the target: locks the source rows, reads again and corrects.
pub fn settle(shape: &Shape) -> String {
    let mut out = String::from("<<backfilld>>\ndeclare\n");
    for (i, column) in shape.columns.iter().enumerate() {
        out.push_str(&format!("  v{i} {};\n", column.sql_type));
    }
    out.push_str("begin\n");
    for k in 0..shape.joins.len() {
        out.push_str(&hold_row(shape, k, &shape.row_as_target("new"), &shape.path_to(k), "  "));
    }
    // With their label, since a column may be called v0.
    let into: Vec<String> = (0..shape.columns.len()).map(|i| format!("backfilld.v{i}")).collect();
    out.push_str(&assign(shape, &into, ""));
    let set: Vec<String> = shape.columns.iter().zip(&into).map(|(c, v)| format!("{} = {v}", c.name.sql())).collect();
    let stale: Vec<String> =
        shape.columns.iter().zip(&into).map(|(c, v)| c.differs(&format!("t.{}", c.name.sql()), v)).collect();
    let mut same = vec![shape.key_equal("t", "new")];
    same.extend(shape.ref_columns(TARGET_ALIAS).iter().map(|c| shape.same(TARGET_ALIAS, c, "t", "new")));
    out.push_str(&format!(
        "  update {} as t set {}\n  where {} and ({});\n  return null;\nend",
        shape.target.sql(),
        set.join(", "),
        same.join(" and "),
        stale.join(" or ")
    ));
    out
}

/// AFTER triggers of source `k`: brings the target rows that hang on the changed row up to date.
pub fn propagate(shape: &Shape, k: usize) -> String {
    let join = &shape.joins[k];
    let alias = join.alias.as_str();
    let mut out = String::from("begin\n");
    if join.covered && join.replaceable {
        // Deferred: gone for good as a rule, and then nothing refers to it.
        out.push_str(&format!(
            "  if tg_op = 'DELETE' then\n    perform 1 from {} as {} where {};\n    \
             if not found then return null; end if;\n  end if;\n",
            join.table.sql(),
            join.alias.sql(),
            at_row(join, "old")
        ));
    }
    out.push_str(&format!(
        "  if {STRICT} then\n    \
         raise exception 'backfilld job %: a change of % at isolation level % cannot reach rows that this transaction does \
         not see', {}, {}, current_setting('transaction_isolation')\n      \
         using errcode = 'feature_not_supported', hint = 'change it in a READ COMMITTED transaction';\n  end if;\n",
        literal(&shape.job),
        literal(&join.table.to_string())
    ));
    let moved: Vec<String> = join.on.iter().map(|on| shape.changed(alias, &on.column)).collect();
    let moved = moved.join(" or ");
    if !join.covered {
        out.push_str(&format!(
            "  if tg_op = 'TRUNCATE' then\n{}    return null;\n  end if;\n",
            rederive(shape, "true", "    ")
        ));
    }
    // Rows without an old or a new side differ by operation; a covered source sees UPDATE, and DELETE where replaceable.
    let old = touch(shape, k, "old", "    ");
    let arrived = format!("{}{}", hold_later(shape, k, "    "), touch(shape, k, "new", "    "));
    out.push_str(&format!(
        "  if tg_op <> 'INSERT' then\n{}{}{old}  end if;\n",
        hold_later_if_repointed(shape, k),
        hold_later_if_replaced(shape, k)
    ));
    let mut arrives = format!("tg_op = 'UPDATE' and ({moved})");
    if !join.covered {
        let new: Vec<String> = join.on.iter().map(|on| format!("new.{}", on.column.sql())).collect();
        let place = take_place(shape, k, &place(shape, k, &new), "", "    ");
        out.push_str(&format!("  if tg_op = 'INSERT' then\n{place}{arrived}  end if;\n"));
        out.push_str(&format!("  if {arrives} then\n{place}{arrived}  end if;\n"));
        arrives.clear();
    }
    if !arrives.is_empty() {
        out.push_str(&format!("  if {arrives} then\n{arrived}  end if;\n"));
    }
    out.push_str("  return null;\nend");
    out
}

fn may_raise(shape: &Shape) -> bool {
    shape.columns.iter().any(ColumnShape::may_raise)
}

fn inner_steps(joins: &[&JoinShape]) -> String {
    joins.iter().map(|j| format!(" {}", join_sql(j, JoinKind::Inner))).collect()
}

/// Locks the source row of join `k` against change until commit, reached over `path` from the one-row item `from`. Where
/// the row is missing and no foreign key says that it cannot appear, the place where it would be is locked instead; and
/// since it may have come while that was waited for, it is looked for once more.
fn hold_row(shape: &Shape, k: usize, from: &str, path: &[&JoinShape], indent: &str) -> String {
    let join = &shape.joins[k];
    let before = inner_steps(path);
    let lock = format!(
        "perform 1 from {from}{before} {} for share of {};\n",
        join_sql(join, JoinKind::Inner),
        join.alias.sql()
    );
    if join.covered {
        return format!("{indent}{lock}");
    }
    let (place, known) = place_of_references(shape, k);
    let tail = format!(" from {from}{before}");
    format!(
        "{indent}{lock}{indent}if not found then\n\
         {indent}  perform 1 from {from}{before} where {known};\n\
         {indent}  if found then\n{}{indent}    {lock}\
         {indent}    if not found and {STRICT} then\n\
         {indent}      raise exception 'backfilld job %: at isolation level % nobody can tell whether a row of % is missing', \
         {}, current_setting('transaction_isolation'), {}\n\
         {indent}        using errcode = 'feature_not_supported', hint = 'write the row in a READ COMMITTED transaction';\n\
         {indent}    end if;\n{indent}  end if;\n{indent}end if;\n",
        take_place(shape, k, &place, &tail, &format!("{indent}    ")),
        literal(&shape.job),
        literal(&join.table.to_string()),
    )
}

/// Places that a transaction locks one by one. The server's lock table has room for 64 a connection by default
/// (`max_locks_per_transaction`), and a bulk load must not run out of it: it locks all places together from there on.
const PLACES: u32 = 32;

/// Locks the place of a missing row of join `k`: target rows share it, and a source row has it for itself. Everyone has a
/// share of the own side's common lock, too; a transaction with more than [`PLACES`] places takes the whole of the other
/// side's. `tail`: a FROM clause with the one target row whose place it is; empty for a source row.
fn take_place(shape: &Shape, k: usize, place: &str, tail: &str, indent: &str) -> String {
    let (own, other, mode) = match tail {
        "" => ("sources", "targets", ""),
        _ => ("targets", "sources", "_shared"),
    };
    let places = "coalesce(nullif(current_setting('backfilld.places', true), ''), '0')::int";
    format!(
        "{indent}perform pg_advisory_xact_lock_shared({});\n\
         {indent}perform set_config('backfilld.places', ({places} + 1)::text, true);\n\
         {indent}if {places} <= {PLACES} then\n{indent}  perform pg_advisory_xact_lock{mode}({place}){tail};\n\
         {indent}else\n{indent}  perform pg_advisory_xact_lock({});\n{indent}end if;\n",
        common_place(shape, k, own),
        common_place(shape, k, other),
    )
}

/// The advisory key of a side's common lock.
fn common_place(shape: &Shape, k: usize, side: &str) -> String {
    format!("hashtextextended({}, {k})", literal(&format!("backfilld/{}/{side}", shape.job)))
}

/// As [`hold_row`] for the rows of join `later` that are reached from all target rows on source row `row` of join `k`, and
/// for all places at once if any is missing.
fn hold_rows(shape: &Shape, k: usize, later: usize, row: &str, indent: &str) -> String {
    let join = &shape.joins[later];
    let path = shape.path_to(later);
    let from = format!("{} as t{}", shape.target.sql(), inner_steps(&path));
    let at_row = at_row(&shape.joins[k], row);
    let lock = format!(
        "{indent}perform 1 from {from} {} where {at_row} for share of {};\n",
        join_sql(join, JoinKind::Inner),
        join.alias.sql()
    );
    if join.covered {
        return lock;
    }
    let (_, known) = place_of_references(shape, later);
    format!(
        "{lock}{indent}perform 1 from {from} {} where {at_row} and {known} and {}.{} is null;\n\
         {indent}if found then\n{indent}  perform pg_advisory_xact_lock_shared({});\n\
         {indent}  perform pg_advisory_xact_lock({});\n{indent}  {}{indent}end if;\n",
        join_sql(join, JoinKind::Left),
        join.alias.sql(),
        join.on[0].column.sql(),
        common_place(shape, later, "targets"),
        common_place(shape, later, "sources"),
        lock.trim_start(),
    )
}

/// A source row that now refers to other source rows further down must hold them still, or a change of theirs, committing
/// at the same time, would be missed by both (the same write skew as for target rows).
fn hold_later(shape: &Shape, k: usize, indent: &str) -> String {
    let join = &shape.joins[k];
    if shape.ref_columns(join.alias.as_str()).is_empty() {
        return String::new();
    }
    let columns: Vec<String> =
        shape.reads(join.alias.as_str()).iter().map(|c| format!("new.{0} as {0}", c.sql())).collect();
    let from = format!("(select {}) as {}", columns.join(", "), join.alias.sql());
    let mut out = String::new();
    for later in k + 1..shape.joins.len() {
        let path = shape.path_to(later);
        if !path.iter().any(|j| j.alias == join.alias) {
            continue;
        }
        // Either the whole path starts at this row, or it depends on the target rows as well.
        let rest: Vec<&JoinShape> = path.iter().copied().filter(|j| j.alias != join.alias).collect();
        let needs_more = |j: &JoinShape| {
            j.on.iter().any(|o| o.ref_alias != join.alias && !rest.iter().any(|r| r.alias == o.ref_alias))
        };
        let before = |j: &JoinShape| shape.joins[..k].iter().any(|e| e.alias == j.alias);
        if needs_more(&shape.joins[later]) || rest.iter().any(|j| before(j) || needs_more(j)) {
            out.push_str(&hold_rows(shape, k, later, "new", indent));
        } else {
            out.push_str(&hold_row(shape, later, &from, &rest, indent));
        }
    }
    out
}

/// [`hold_later`] for an UPDATE that leaves the row's own key alone; if that moved as well, the row's arrival does it.
fn hold_later_if_repointed(shape: &Shape, k: usize) -> String {
    let later = hold_later(shape, k, "      ");
    if later.is_empty() {
        return later;
    }
    let alias = shape.joins[k].alias.as_str();
    let changed: Vec<String> = shape.ref_columns(alias).iter().map(|c| shape.changed(alias, c)).collect();
    format!("    if tg_op = 'UPDATE' and ({}) then\n{later}    end if;\n", changed.join(" or "))
}

/// [`hold_later`] for a row that was deleted and inserted again.
fn hold_later_if_replaced(shape: &Shape, k: usize) -> String {
    let join = &shape.joins[k];
    let hangs = |later: &usize| shape.path_to(*later).iter().any(|j| j.alias == join.alias);
    let later: String =
        (k + 1..shape.joins.len()).filter(hangs).map(|later| hold_rows(shape, k, later, "old", "      ")).collect();
    if later.is_empty() || !(join.covered && join.replaceable) {
        return String::new();
    }
    format!("    if tg_op = 'DELETE' then\n{later}    end if;\n")
}

/// The condition that join `join` is at source row `row`, by all its columns.
fn at_row(join: &JoinShape, row: &str) -> String {
    let on: Vec<String> =
        join.on.iter().map(|on| on.against(&join.alias, &format!("{row}.{}", on.column.sql()))).collect();
    on.join(" and ")
}

/// The advisory key of the place to which the references of join `k` point, and the condition that they point anywhere.
fn place_of_references(shape: &Shape, k: usize) -> (String, String) {
    let references: Vec<String> =
        shape.joins[k].on.iter().map(|on| format!("{}.{}", on.ref_alias.sql(), on.ref_column.sql())).collect();
    let known: Vec<String> = references.iter().map(|r| format!("{r} is not null")).collect();
    (place(shape, k, &references), known.join(" and "))
}

/// The advisory key of the place where a missing source row would be: the hash of its key, by the type's own hash
/// function, so that keys that are equal have one place (citext, numeric), whatever the session's formats are.
fn place(shape: &Shape, k: usize, values: &[String]) -> String {
    let join = format!("hashtextextended({}, {k})", literal(&format!("backfilld/{}", shape.job)));
    if shape.joins[k].hashable { format!("hash_record_extended(row({}), {join})", values.join(", ")) } else { join }
}

/// Brings the target rows that hang on source row `row` (`old` or `new`) up to date: first lock them all, in key order,
/// then read in a second statement, whose snapshot sees everything that the locks waited for (I2).
fn touch(shape: &Shape, k: usize, row: &str, indent: &str) -> String {
    let condition = hangs_on(shape, k, row);
    format!(
        "{indent}perform 1 from {} as t where {condition} order by {} for no key update of t;\n{}",
        shape.target.sql(),
        shape.key_of("t"),
        rederive(shape, &condition, indent)
    )
}

/// Derives the target rows of `condition` again. Where deriving may raise, the BEFORE trigger does it, row by row, and
/// turns the error into NULL; otherwise only rows that differ are written.
fn rederive(shape: &Shape, condition: &str, indent: &str) -> String {
    let target = shape.target.sql();
    let names: Vec<String> = shape.columns.iter().map(|c| c.name.sql()).collect();
    if may_raise(shape) {
        let same: Vec<String> = names.iter().map(|n| format!("{n} = t.{n}")).collect();
        return format!("{indent}update {target} as t set {} where {condition};\n", same.join(", "));
    }
    let left = if names.len() == 1 { names.concat() } else { format!("({})", names.join(", ")) };
    let stale: Vec<String> =
        shape.columns.iter().map(|c| c.differs(&format!("t.{}", c.name.sql()), &shape.scalar(c, "t"))).collect();
    format!(
        "{indent}update {target} as t set {left} = ({})\n{indent}where {condition}\n{indent}  and ({});\n",
        shape.derive_select("t", &shape.columns, None),
        stale.join(" or ")
    )
}

/// The condition on a target row `t` that it hangs on the row `row` of join `k`.
fn hangs_on(shape: &Shape, k: usize, row: &str) -> String {
    let refers: Vec<String> = shape.joins[k]
        .on
        .iter()
        .map(|on| {
            let place = format!("{}.{}", on.ref_alias.sql(), on.ref_column.sql());
            format!("{row}.{} {} {place}", on.column.sql(), on.operator)
        })
        .collect();
    let path = shape.path_to(k);
    let Some((first, rest)) = path.split_first() else { return refers.join(" and ") };
    let on: Vec<String> = first.on.iter().map(|o| o.sql(&first.alias)).collect();
    format!(
        "exists (select from {} as {}{} where {} and {})",
        first.table.sql(),
        first.alias.sql(),
        inner_steps(rest),
        on.join(" and "),
        refers.join(" and ")
    )
}
