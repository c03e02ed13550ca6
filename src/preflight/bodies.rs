//! What other functions of the application do with the tables of the job, as far as their text shows it.

use tokio_postgres::types::Type;

use super::check::{Check, Tally};
use super::probe::{Probe, text};
use crate::error::Result;
use crate::job::lex::{self, Token, TokenKind};
use crate::pg::ident::{Ident, QualifiedName, split_qualified};
use crate::plan::Facts;
use crate::plan::shape::SYNC_SCHEMA;

/// A function whose text speaks of a table of the job.
struct Function {
    /// `schema.name(argument types)`, quoted.
    shown: String,
    definer: bool,
    search_path: Option<String>,
    body: String,
    /// The job replaces it in the flip.
    replaced: bool,
    /// Gives rows of the target's own type, which follow the table.
    returns_target: bool,
    /// The catalog says that it uses one of the tables (a body in standard SQL).
    depends: bool,
}

/// The checks of this file.
///
/// # Errors
/// The connection is gone.
pub async fn checks(p: &Probe<'_>, facts: &Facts) -> Result<Vec<Check>> {
    let found = functions(p, facts).await;
    let both = found.map(|f| vec![definer_functions(facts, &f), column_lists(facts, &f)]);
    p.settle_all(&["definer_functions", "column_lists"], both)
}

/// Functions of extensions and of backfilld are not the application's.
async fn functions(p: &Probe<'_>, facts: &Facts) -> Result<Vec<Function>> {
    let tables = tables(facts);
    let names: Vec<&str> = tables.iter().map(|t| t.name.as_str()).collect();
    let oids: Vec<String> = facts.sources.iter().chain([&facts.target]).map(|t| t.oid.to_string()).collect();
    let replaced: Vec<&str> = p.spec.functions.iter().map(|f| f.signature.as_str()).collect();
    let rows = p
        .rows(
            "select format('%I.%I(%s)', n.nspname, f.proname, pg_get_function_identity_arguments(f.oid)), f.prosecdef,
                    (select substr(c, 13) from unnest(f.proconfig) as c where starts_with(c, 'search_path=')),
                    case when l.lanname in ('sql', 'plpgsql') then f.prosrc else '' end,
                    exists (select from unnest($3) as s where to_regprocedure(s) = f.oid),
                    exists (select from pg_type t where t.oid = f.prorettype and t.typrelid = $4::text::oid), d.uses
             from pg_proc f join pg_namespace n on n.oid = f.pronamespace join pg_language l on l.oid = f.prolang
             cross join lateral (select exists (select from pg_depend d where d.classid = 'pg_proc'::regclass
               and d.objid = f.oid and d.refclassid = 'pg_class'::regclass and d.refobjid::text = any ($2)) as uses) as d
             where n.nspname not in ('pg_catalog', 'information_schema', 'backfilld', $5)
               and f.prokind in ('f', 'p')
               and (d.uses or exists (select from unnest($1) as x where strpos(lower(f.prosrc), lower(x)) > 0))
               and not exists (select from pg_depend e where e.classid = 'pg_proc'::regclass and e.objid = f.oid
                               and e.deptype = 'e')
             order by 1",
            &[
                (&names, Type::TEXT_ARRAY),
                (&oids, Type::TEXT_ARRAY),
                (&replaced, Type::TEXT_ARRAY),
                text(&facts.target.oid.to_string()),
                text(&SYNC_SCHEMA),
            ],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|r| Function {
            shown: r.get(0),
            definer: r.get(1),
            search_path: r.get(2),
            body: r.get(3),
            replaced: r.get(4),
            returns_target: r.get(5),
            depends: r.get(6),
        })
        .collect())
}

fn tables(facts: &Facts) -> Vec<QualifiedName> {
    std::iter::once(&facts.target).chain(&facts.sources).map(|t| t.name.clone()).collect()
}

/// A SECURITY DEFINER function without a fixed search_path works on whatever tables its caller puts in front (hazard 46).
fn definer_functions(facts: &Facts, functions: &[Function]) -> Check {
    let tables = tables(facts);
    let mut tally = Tally::default();
    let mut lines = Vec::new();
    let mut seen = 0;
    for f in functions.iter().filter(|f| f.definer) {
        let tokens = lex::tokens(&f.body).unwrap_or_default();
        if !f.depends && !tables.iter().any(|t| !mentions(&tokens, t).is_empty() || in_string(&tokens, t)) {
            continue;
        }
        seen += 1;
        let fault = match f.search_path.as_deref().map(fixed) {
            Some(true) => continue,
            Some(false) => "has a search_path that does not end in pg_temp",
            None => "has no search_path of its own",
        };
        if f.replaced {
            lines.push(format!("{} {fault}; the job replaces it", f.shown));
            continue;
        }
        let schema = facts.target.name.schema.sql();
        let path = match f.search_path.as_deref() {
            Some(path) => format!("{path}, pg_temp"),
            None => format!("pg_catalog, {schema}, pg_temp"),
        };
        tally.warn(
            format!("{} is security definer and {fault}", f.shown),
            format!(
                "its caller can put a table of that name in front, and it works on that with its owner's rights: alter \
                 routine {} set search_path = {path}",
                f.shown
            ),
        );
    }
    tally.check("definer_functions", format!("{seen} use a table of the job, none to remark")).details(lines)
}

/// `pg_temp` is searched first unless it is named; an empty path finds nothing that is not qualified.
fn fixed(path: &str) -> bool {
    let last = path.rsplit(',').next().unwrap_or_default().trim().trim_matches('\'');
    let last = split_qualified(last).ok().and_then(|v| v.first().map(|i| i.as_str().to_owned()));
    matches!(last.as_deref(), None | Some("pg_temp" | ""))
}

/// With a column more, `*` gives a column more, and an INSERT without list takes one more.
fn column_lists(facts: &Facts, functions: &[Function]) -> Check {
    let target = &facts.target.name;
    let columns: Vec<String> =
        facts.target.columns.iter().filter_map(|c| Some(Ident::new(&c.name).ok()?.sql())).collect();
    let mut tally = Tally::default();
    let mut lines = Vec::new();
    for f in functions {
        let tokens = lex::tokens(&f.body).unwrap_or_default();
        let mut faults = Vec::new();
        if !f.returns_target && stars(&tokens, target) {
            faults.push(("selects *", "its result no longer fits RETURNS TABLE, UNION or another table's INSERT"));
        }
        if inserts_without_list(&tokens, target) {
            faults.push(("inserts without a column list", "one value more would go into the new column"));
        }
        for (what, why) in faults {
            if f.replaced {
                lines.push(format!("{} {what}; the job replaces it", f.shown));
                continue;
            }
            tally.warn(
                format!("{} {what} on {target}", f.shown),
                format!("with a column more, {why}: name the columns, ({})", columns.join(", ")),
            );
        }
    }
    tally.check("column_lists", "functions name the columns of the target").details(lines)
}

/// Where the body names the table: after a word that calls for one, or with its schema.
fn mentions(tokens: &[Token], table: &QualifiedName) -> Vec<usize> {
    let word = |i: usize| tokens.get(i).map_or("", |t| t.value.as_str());
    let is = |i: usize, name: &str| tokens.get(i).is_some_and(|t| is_name(t) && t.value == name);
    let calls_for = ["from", "join", "into", "update", "only", "table", "using"];
    (0..tokens.len())
        .filter(|&i| is(i, table.name.as_str()))
        .filter(|&i| match i {
            0 => false,
            _ if word(i - 1) == "." => i > 1 && is(i - 2, table.schema.as_str()),
            _ => calls_for.contains(&word(i - 1)),
        })
        .collect()
}

/// Dynamic SQL: a string with the table's name as a word.
fn in_string(tokens: &[Token], table: &QualifiedName) -> bool {
    tokens.iter().filter(|t| t.kind == TokenKind::Str).any(|t| {
        t.value.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w.eq_ignore_ascii_case(table.name.as_str()))
    })
}

fn is_name(token: &Token) -> bool {
    matches!(token.kind, TokenKind::Word | TokenKind::Quoted)
}

/// The statements of a body; each token with its depth of parentheses.
fn statements(tokens: &[Token]) -> impl Iterator<Item = &[Token]> {
    tokens.split(|t| t.kind == TokenKind::Symbol && t.value == ";")
}

/// `select *`, `select alias.*` or `returning *` in a statement of the body that names the table.
fn stars(tokens: &[Token], table: &QualifiedName) -> bool {
    statements(tokens).any(|s| {
        let named = mentions(s, table);
        let aliases: Vec<&str> = named.iter().map(|i| alias(s, *i, table)).collect();
        !named.is_empty()
            && (1..s.len()).filter(|&i| s[i].kind == TokenKind::Symbol && s[i].value == "*").any(|i| {
                let before = |k: usize| i.checked_sub(k).map_or("", |j| s[j].value.as_str());
                let opens = |w: &str| matches!(w, "select" | "distinct" | "all" | "returning" | ",");
                let qualified = before(1) == "." && opens(before(3)) && aliases.contains(&before(2));
                opens(before(1)) && within(s, i, &named) || qualified
            })
    })
}

/// Whether a bare star at `star` belongs to a query that names the table itself, not in a subselect of it.
fn within(s: &[Token], star: usize, named: &[usize]) -> bool {
    let depth = |to: usize| {
        s[..to].iter().filter(|t| t.kind == TokenKind::Symbol).fold(0i32, |d, t| match t.value.as_str() {
            "(" => d + 1,
            ")" => d - 1,
            _ => d,
        })
    };
    let at = depth(star);
    named.iter().any(|&n| depth(n) == at && (star.min(n)..star.max(n)).all(|i| depth(i) >= at))
}

fn alias<'a>(s: &'a [Token], at: usize, table: &'a QualifiedName) -> &'a str {
    let next = match s.get(at + 1) {
        Some(t) if t.value == "as" => s.get(at + 2),
        other => other,
    };
    let keywords = ["where", "on", "join", "left", "inner", "cross", "order", "group", "limit", "set", "for", "loop"];
    match next {
        Some(t) if is_name(t) && !keywords.contains(&t.value.as_str()) => &t.value,
        _ => table.name.as_str(),
    }
}

fn inserts_without_list(tokens: &[Token], table: &QualifiedName) -> bool {
    mentions(tokens, table).into_iter().any(|i| {
        let head = if tokens[i - 1].value == "." { i.saturating_sub(3) } else { i - 1 };
        if head == 0 || tokens[head].value != "into" || tokens[head - 1].value != "insert" {
            return false;
        }
        let word = |k: usize| tokens.get(i + k).map_or("", |t| t.value.as_str());
        let at = if word(1) == "as" { 3 } else { 1 };
        match word(at) {
            "(" => matches!(word(at + 1), "select" | "with" | "values" | "table"),
            "default" => false,
            _ => true,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> QualifiedName {
        "public.messages".parse().expect("a name")
    }

    fn look(body: &str) -> (bool, bool) {
        let tokens = lex::tokens(body).expect("lexes");
        (stars(&tokens, &table()), inserts_without_list(&tokens, &table()))
    }

    #[test]
    fn stars_of_the_table_are_found_and_no_others() {
        for body in [
            "select * from messages",
            "begin return query select m.* from public.messages as m where m.id = x; end",
            "insert into messages (a) values (1) returning *",
            "insert into archive select * from messages",
            "select x, m.* from b join messages m on m.b = b.id",
            "select * from (select * from messages) as x",
        ] {
            assert!(look(body).0, "{body}");
        }
        for body in [
            "select count(*) from messages",
            "select a * b from messages",
            "select * from other.messages",
            "select * from users; select a from messages",
            "select o.* from other o join messages m on m.o = o.id",
            "select * from t where id in (select t_id from messages)",
            "select '* from messages'",
        ] {
            assert!(!look(body).0, "{body}");
        }
    }

    #[test]
    fn inserts_without_list_are_found_and_no_others() {
        for body in [
            "insert into messages values (1)",
            "insert into public.messages as m values (1)",
            "insert into messages select 1",
            "insert into messages (select 1)",
        ] {
            assert!(look(body).1, "{body}");
        }
        for body in [
            "insert into messages (id) values (1)",
            "insert into messages as m (id) select 1",
            "insert into messages default values",
            "insert into log select id from messages",
        ] {
            assert!(!look(body).1, "{body}");
        }
    }

    #[test]
    fn a_path_is_fixed_that_ends_in_pg_temp_or_is_empty() {
        for (path, good) in [("public, pg_temp", true), ("\"\"", true), ("", true), ("public, extensions", false)] {
            assert_eq!(fixed(path), good, "{path}");
        }
    }
}
