//! Policies as sets: the rows that every user sees, in one query, by putting a column in place of the expression by which
//! a policy knows its user. Pure.

use super::shape::Shape;
use crate::job::lex::{self, Token, TokenKind};
use crate::pg::ident::QualifiedName;

/// Our alias of the users, and their column. Names that no application has.
const USERS: &str = "\"backfilld users\"";
const USER: &str = "\"backfilld users\".\"backfilld user\"";

/// How a comparison by sets goes through the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// All users joined to a range of pages: one pass over the table.
    Rows,
    /// For some users at a time, whatever each sees.
    Users,
}

/// Puts the users' column in place of `user` in a policy's condition.
///
/// # Errors
/// A sentence, if the condition may depend on the session in another way as well.
pub fn bind_user(condition: &str, user: &str) -> Result<String, String> {
    let tokens = lex::tokens(condition)?;
    let wanted = lex::tokens(user)?;
    let same = |a: &Token, b: &Token| a.kind == b.kind && a.value == b.value;
    let mut out = String::new();
    let (mut at, mut i) = (0, 0);
    let mut left: Vec<&Token> = Vec::new();
    while i < tokens.len() {
        let found = i + wanted.len() <= tokens.len() && wanted.iter().zip(&tokens[i..]).all(|(a, b)| same(a, b));
        if !found {
            left.push(&tokens[i]);
            i += 1;
            continue;
        }
        let (from, to) = whole_subselect(&tokens, i, i + wanted.len());
        // What was kept of `(select` goes, too.
        left.truncate(left.len() - (i - from));
        out.push_str(&condition[at..tokens[from].start]);
        out.push_str(USER);
        at = tokens[to - 1].end;
        i = to;
    }
    out.push_str(&condition[at..]);
    match depends_on_session(&left) {
        Some(what) => Err(what),
        None => Ok(out),
    }
}

/// Widens the tokens from `from` up to `to` to a `( select ... [as name] )` around them: as a subselect it could not be
/// joined by.
fn whole_subselect(tokens: &[Token], from: usize, to: usize) -> (usize, usize) {
    let symbol = |i: usize, s: &str| tokens.get(i).is_some_and(|t| t.kind == TokenKind::Symbol && t.value == s);
    let word = |i: usize, s: &str| tokens.get(i).is_some_and(|t| t.kind == TokenKind::Word && t.value == s);
    if from < 2 || !word(from - 1, "select") || !symbol(from - 2, "(") {
        return (from, to);
    }
    let end = if word(to, "as") { to + 2 } else { to };
    if symbol(end, ")") { (from - 2, end + 1) } else { (from, to) }
}

/// Whether what is left of a condition looks at the session, or calls a function that might.
fn depends_on_session(tokens: &[&Token]) -> Option<String> {
    if let Some(name) = names_session_user(tokens.iter().copied()) {
        return Some(format!("it also looks at {name}"));
    }
    for w in tokens.windows(4) {
        let call =
            w[1].kind == TokenKind::Symbol && w[1].value == "." && w[3].kind == TokenKind::Symbol && w[3].value == "(";
        let operator = w[0].value == "operator";
        if call && !operator && w[0].value != "pg_catalog" && matches!(w[0].kind, TokenKind::Word | TokenKind::Quoted) {
            return Some(format!("it also calls {}.{}()", w[0].value, w[2].value));
        }
    }
    tokens.iter().find(|t| t.value == "current_setting").map(|_| "it also reads a setting".to_owned())
}

/// The first word that names the session's or the current role.
pub fn names_session_user<'a>(tokens: impl Iterator<Item = &'a Token>) -> Option<&'a str> {
    const WORDS: [&str; 5] = ["current_user", "session_user", "current_role", "user", "system_user"];
    let mut before: Option<&Token> = None;
    for token in tokens {
        let dotted = before.is_some_and(|b| b.kind == TokenKind::Symbol && b.value == ".");
        if token.kind == TokenKind::Word && !dotted && WORDS.contains(&token.value.as_str()) {
            return Some(&token.value);
        }
        before = Some(token);
    }
    None
}

/// Per user of `$1`: number and hash of the rows for which `condition` (from [`bind_user`]) holds.
pub fn seen(shape: &Shape, condition: &str, way: Way, range: &str) -> String {
    let target = shape.target.sql();
    let sql_type = shape.columns.first().map_or("text", |c| c.sql_type.as_str());
    let users = format!("(select x::{sql_type} as \"backfilld user\" from unnest($1::text[]) as x) as {USERS}");
    let hash = format!("hashtextextended({}, 0)", shape.key_as_one_text(&row_name(&shape.target)));
    match way {
        Way::Rows => format!(
            "select {USER}::text, count(*)::int8, coalesce(bit_xor({hash}), 0)::int8\nfrom {target} join {users} on \
             ({condition})\nwhere {range}\ngroup by 1"
        ),
        Way::Users => format!(
            "select {USER}::text, x.n, x.h\nfrom {users} cross join lateral (select count(*)::int8 as n, \
             coalesce(bit_xor({hash}), 0)::int8 as h from {target} where {condition}) as x\nwhere x.n > 0"
        ),
    }
}

/// Users of `$1` for whom two statements of [`seen`] give different rows, in one snapshot: user, rows of the first, of the second.
pub fn differing(old: &str, new: &str) -> String {
    format!(
        "select coalesce(o.u, n.u), coalesce(o.n, 0)::int8, coalesce(n.n, 0)::int8\nfrom ({old}) as o(u, n, h)\n\
         full join ({new}) as n(u, n, h) on o.u = n.u\nwhere (o.n, o.h) is distinct from (n.n, n.h)"
    )
}

/// Keys, as one text each, of rows for which `condition` holds for several of the users that the query `users` gives; at most
/// `limit`.
pub fn shared(shape: &Shape, condition: &str, way: Way, users: &str, limit: i64) -> String {
    let target = shape.target.sql();
    let sql_type = shape.columns.first().map_or("text", |c| c.sql_type.as_str());
    let users = format!(
        "(select distinct x.v::text::{sql_type} as \"backfilld user\" from ({users}) as x(v) where x.v is not null) as {USERS}"
    );
    let row = row_name(&shape.target);
    let key: Vec<String> = shape.key.iter().map(|k| format!("{row}.{}::text", k.name.sql())).collect();
    let key = format!("concat_ws(',', {})", key.join(", "));
    let several = format!("group by 1 having count(*) > 1 limit {limit}");
    match way {
        Way::Rows => format!("select {key} from {target} join {users} on ({condition})\n{several}"),
        Way::Users => format!(
            "select x.k from {users} cross join lateral (select {key} as k from {target} where {condition}) as x\n{several}"
        ),
    }
}

/// The target without alias: a policy's text names its columns bare, or after the table's name.
pub fn row_name(target: &QualifiedName) -> String {
    target.name.sql()
}

/// A range of pages; as `verify_sql::page_range`, but without alias.
pub fn pages(target: &QualifiedName, low: u64, high: Option<u64>) -> String {
    super::verify_sql::page_range(low, high).replace("t.ctid", &format!("{}.ctid", row_name(target)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_is_put_in_wherever_it_stands() {
        let bind = |c: &str| bind_user(c, "auth.uid()");
        assert_eq!(bind("(owner = ( SELECT auth.uid() AS uid))").unwrap(), format!("(owner = {USER})"));
        assert_eq!(
            bind("(c IN ( SELECT c.id FROM public.c WHERE (c.o = auth.uid())))").unwrap(),
            format!("(c IN ( SELECT c.id FROM public.c WHERE (c.o = {USER})))")
        );
        assert_eq!(bind("true").unwrap(), "true");
        assert_eq!(
            bind("(a = (select auth.uid())) or note = 'auth.uid()'").unwrap(),
            format!("(a = {USER}) or note = 'auth.uid()'")
        );
    }

    #[test]
    fn what_else_depends_on_the_session_is_refused() {
        let why = |c: &str| bind_user(c, "auth.uid()").unwrap_err();
        assert_eq!(why("a = auth.uid() and b = auth.role()"), "it also calls auth.role()");
        assert_eq!(why("a = current_user"), "it also looks at current_user");
        assert_eq!(why("a = current_setting('x.y')"), "it also reads a setting");
        assert!(
            bind_user("lower(a) operator(pg_catalog.=) 'x' and public.users.user = auth.uid()", "auth.uid()").is_ok()
        );
    }
}
