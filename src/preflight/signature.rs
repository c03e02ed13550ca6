//! The head of a `create function` statement, read as far as `create or replace` compares it. Pure.

use crate::job::lex::{self, Token, TokenKind};

/// What stands before the body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Schema, if written.
    pub schema: Option<String>,
    /// Name.
    pub name: String,
    /// Parameters, in order.
    pub parameters: Vec<Parameter>,
    /// What is behind `returns`, as written; empty for none, `table` for a table.
    pub returns: String,
    /// `returns setof`.
    pub returns_set: bool,
    /// `security definer`.
    pub security_definer: bool,
    /// The value of `set search_path`, as written, without spaces.
    pub search_path: Option<String>,
}

/// A parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// `in`, `out`, `inout` or `variadic`.
    pub mode: String,
    /// Name; empty for none.
    pub name: String,
    /// Type, as written.
    pub sql_type: String,
    /// Has a default.
    pub has_default: bool,
}

impl Head {
    /// Parameters that a call gives.
    pub fn inputs(&self) -> impl Iterator<Item = &Parameter> {
        self.parameters.iter().filter(|p| p.mode != "out")
    }
}

/// Words that end the type behind `returns`.
const CLAUSES: &[&str] = &[
    "language",
    "transform",
    "window",
    "immutable",
    "stable",
    "volatile",
    "not",
    "leakproof",
    "called",
    "returns",
    "strict",
    "external",
    "security",
    "parallel",
    "cost",
    "rows",
    "support",
    "set",
    "as",
    "return",
    "begin",
];

/// Types of several words: first and second.
const TWO_WORDS: &[(&str, &[&str])] = &[
    ("double", &["precision"]),
    ("character", &["varying"]),
    ("char", &["varying"]),
    ("national", &["character", "char"]),
    ("bit", &["varying"]),
    ("time", &["with", "without"]),
    ("timestamp", &["with", "without"]),
    ("interval", &["year", "month", "day", "hour", "minute", "second"]),
];

/// Reads the head of `create [or replace] function|procedure`. `None` for any other statement.
pub fn head(sql: &str) -> Option<Head> {
    let tokens = lex::tokens(sql).ok()?;
    let words: Vec<&str> = tokens.iter().take(4).map(|t| t.value.as_str()).collect();
    let mut at = match words.as_slice() {
        ["create", "or", "replace", "function" | "procedure"] => 4,
        ["create", "function" | "procedure", ..] => 2,
        _ => return None,
    };
    let mut name = tokens.get(at)?.value.clone();
    let mut schema = None;
    if is(tokens.get(at + 1), ".") {
        schema = Some(std::mem::replace(&mut name, tokens.get(at + 2)?.value.clone()));
        at += 2;
    }
    at += 1;
    if !is(tokens.get(at), "(") {
        return None;
    }
    let close = closing(&tokens, at)?;
    let parameters = split(&tokens[at + 1..close]).into_iter().filter_map(|p| parameter(sql, p)).collect();
    let rest = &tokens[close + 1..];
    let (returns, returns_set) = returns(sql, rest);
    Some(Head {
        schema,
        name,
        parameters,
        returns,
        returns_set,
        security_definer: rest.windows(2).any(|w| w[0].value == "security" && w[1].value == "definer"),
        search_path: search_path(sql, rest),
    })
}

fn is(token: Option<&Token>, symbol: &str) -> bool {
    token.is_some_and(|t| t.kind == TokenKind::Symbol && t.value == symbol)
}

fn closing(tokens: &[Token], open: usize) -> Option<usize> {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        if is(Some(token), "(") {
            depth += 1;
        } else if is(Some(token), ")") {
            depth -= 1;
            if depth == 0 {
                return Some(i);
            }
        }
    }
    None
}

/// Splits at commas outside parentheses and brackets.
fn split(tokens: &[Token]) -> Vec<&[Token]> {
    let (mut out, mut depth, mut from) = (Vec::new(), 0, 0);
    for (i, token) in tokens.iter().enumerate() {
        match token.value.as_str() {
            "(" | "[" if token.kind == TokenKind::Symbol => depth += 1,
            ")" | "]" if token.kind == TokenKind::Symbol => depth -= 1,
            "," if token.kind == TokenKind::Symbol && depth == 0 => {
                out.push(&tokens[from..i]);
                from = i + 1;
            }
            _ => {}
        }
    }
    out.push(&tokens[from..]);
    out.retain(|p| !p.is_empty());
    out
}

fn parameter(sql: &str, mut tokens: &[Token]) -> Option<Parameter> {
    let mut mode = "in".to_owned();
    if let Some(first) = tokens.first()
        && first.kind == TokenKind::Word
        && matches!(first.value.as_str(), "in" | "out" | "inout" | "variadic")
    {
        mode.clone_from(&first.value);
        tokens = &tokens[1..];
    }
    let default = tokens
        .iter()
        .position(|t| (t.kind == TokenKind::Word && t.value == "default") || is(Some(t), "=") || is(Some(t), ":"));
    let tokens_before = &tokens[..default.unwrap_or(tokens.len())];
    let (first, second) = (tokens_before.first()?, tokens_before.get(1));
    let two_words = second.is_some_and(|s| {
        first.kind == TokenKind::Word
            && TWO_WORDS.iter().any(|(a, b)| *a == first.value && b.contains(&s.value.as_str()))
    });
    let named = !two_words && second.is_some_and(|s| matches!(s.kind, TokenKind::Word | TokenKind::Quoted));
    let name = if named { first.value.clone() } else { String::new() };
    let type_tokens = &tokens_before[usize::from(named)..];
    Some(Parameter { mode, name, sql_type: source(sql, type_tokens), has_default: default.is_some() })
}

fn source(sql: &str, tokens: &[Token]) -> String {
    match (tokens.first(), tokens.last()) {
        (Some(first), Some(last)) => sql[first.start..last.end].to_owned(),
        _ => String::new(),
    }
}

fn returns(sql: &str, rest: &[Token]) -> (String, bool) {
    let Some(first) = rest.first().filter(|t| t.value == "returns") else { return (String::new(), false) };
    debug_assert_eq!(first.kind, TokenKind::Word);
    let mut from = 1;
    if rest.get(from).is_some_and(|t| t.value == "table") {
        return ("table".to_owned(), true);
    }
    let set = rest.get(from).is_some_and(|t| t.value == "setof");
    from += usize::from(set);
    let end = rest[from..]
        .iter()
        .position(|t| t.kind == TokenKind::Word && CLAUSES.contains(&t.value.as_str()))
        .map_or(rest.len(), |i| from + i);
    (source(sql, &rest[from..end]), set)
}

fn search_path(sql: &str, rest: &[Token]) -> Option<String> {
    let at = rest.windows(2).position(|w| w[0].value == "set" && w[1].value == "search_path")?;
    let values = &rest[at + 2..];
    let skip = usize::from(values.first().is_some_and(|t| t.value == "=" || t.value == "to"));
    let values = &values[skip..];
    // Values alternate with commas; the first token that breaks the pattern belongs to the next clause.
    let mut end = 0;
    while end < values.len() && (end % 2 == 0 || is(values.get(end), ",")) {
        end += 1;
    }
    Some(source(sql, &values[..end]).chars().filter(|c| !c.is_whitespace()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_function_is_read() {
        let head = head(include_str!("../../deploy/jobs/messages_auth_user_id/add_message.sql")).expect("a function");
        assert_eq!((head.schema.as_deref(), head.name.as_str()), (Some("public"), "add_message"));
        let names: Vec<(&str, &str, bool)> =
            head.parameters.iter().map(|p| (p.name.as_str(), p.sql_type.as_str(), p.has_default)).collect();
        assert_eq!(names[0], ("p_conversation_id", "uuid", false));
        assert_eq!(names[4], ("p_metadata", "jsonb", true));
        assert_eq!((head.returns.as_str(), head.returns_set), ("uuid", false));
        assert!(head.security_definer);
        assert_eq!(head.search_path.as_deref(), Some("pg_catalog,pg_temp"));
    }

    #[test]
    fn unnamed_two_word_and_qualified_types_are_types() {
        let head = head(
            "create function f(double precision, out x s.t, numeric(10, 2), \"P\" timestamp with time zone = now(), \
             int[] := '{}') returns setof s.t language sql set search_path to 's', pg_temp as 'x'",
        )
        .expect("a function");
        let p: Vec<(&str, &str, &str, bool)> = head
            .parameters
            .iter()
            .map(|p| (p.mode.as_str(), p.name.as_str(), p.sql_type.as_str(), p.has_default))
            .collect();
        assert_eq!(p[0], ("in", "", "double precision", false));
        assert_eq!(p[1], ("out", "x", "s.t", false));
        assert_eq!(p[2], ("in", "", "numeric(10, 2)", false));
        assert_eq!(p[3], ("in", "P", "timestamp with time zone", true));
        assert_eq!(p[4], ("in", "", "int[]", true));
        assert_eq!((head.returns.as_str(), head.returns_set), ("s.t", true));
        assert_eq!(head.search_path.as_deref(), Some("'s',pg_temp"));
        assert_eq!(head.inputs().count(), 4);
    }

    #[test]
    fn other_statements_are_not_functions() {
        assert_eq!(head("comment on function f() is 'x'"), None);
        assert_eq!(head("create or replace function"), None);
    }
}
