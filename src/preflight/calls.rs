//! Function calls in policy expressions. Pure; what a function is, the catalog knows.

use crate::job::lex::{self, Token, TokenKind};

/// A call that is not in a scalar subselect, so that it may run once per row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Schema, if written; without one it is pg_catalog's.
    pub schema: Option<String>,
    /// Name.
    pub name: String,
    /// An argument names a column: then it cannot be called once per statement.
    pub takes_columns: bool,
    /// Bytes of the expression from its name to its closing parenthesis.
    span: (usize, usize),
}

impl Call {
    /// Name with schema, for people.
    pub fn shown(&self) -> String {
        self.schema.as_ref().map_or_else(|| self.name.clone(), |s| format!("{s}.{}", self.name))
    }
}

/// The calls of `expression` outside `(select f(...))`. A subselect with FROM does not count: within it, the call runs for
/// each row of what it reads.
pub fn bare_calls(expression: &str) -> Vec<Call> {
    let tokens = lex::tokens(expression).unwrap_or_default();
    let mut open: Vec<bool> = Vec::new();
    let mut out = Vec::new();
    for i in 0..tokens.len() {
        if symbol(&tokens[i], ")") {
            open.pop();
        }
        if !symbol(&tokens[i], "(") {
            continue;
        }
        let wrapped = open.last().copied().unwrap_or(false);
        let close = closing(&tokens, i);
        open.push(scalar_select(&tokens[i + 1..close]) || wrapped && !reads(&tokens[i + 1..close]));
        let Some(name) = i.checked_sub(1).map(|k| &tokens[k]).filter(|t| is_name(t) && !keyword(t)) else { continue };
        let qualified = i >= 3 && symbol(&tokens[i - 2], ".") && is_name(&tokens[i - 3]);
        if wrapped {
            continue;
        }
        let from = if qualified { tokens[i - 3].start } else { name.start };
        out.push(Call {
            schema: qualified.then(|| tokens[i - 3].value.clone()),
            name: name.value.clone(),
            takes_columns: names_columns(&tokens[i + 1..close]),
            span: (from, tokens.get(close).map_or(expression.len(), |t| t.end)),
        });
    }
    out
}

/// The expression with each of these calls in a scalar subselect of its own. Calls inside another one go with it.
pub fn wrap(expression: &str, calls: &[&Call]) -> String {
    let mut out = String::with_capacity(expression.len() + 16);
    let mut at = 0;
    for call in calls.iter().filter(|c| !c.takes_columns) {
        let (from, to) = call.span;
        if from < at {
            continue;
        }
        out.push_str(&expression[at..from]);
        out.push_str(&format!("(select {})", &expression[from..to]));
        at = to;
    }
    out.push_str(&expression[at..]);
    out
}

/// Functions that an expression calls with their schema: `(schema, name)`.
pub fn called_functions(expression: &str) -> Vec<(String, String)> {
    let tokens = lex::tokens(expression).unwrap_or_default();
    let mut out = Vec::new();
    for w in tokens.windows(4) {
        if symbol(&w[1], ".") && symbol(&w[3], "(") && is_name(&w[0]) && is_name(&w[2]) {
            let call = (w[0].value.clone(), w[2].value.clone());
            if !out.contains(&call) {
                out.push(call);
            }
        }
    }
    out
}

fn symbol(token: &Token, s: &str) -> bool {
    token.kind == TokenKind::Symbol && token.value == s
}

fn is_name(token: &Token) -> bool {
    matches!(token.kind, TokenKind::Word | TokenKind::Quoted)
}

/// Words that stand before a parenthesis without calling anything.
fn keyword(token: &Token) -> bool {
    let words = [
        "in", "and", "or", "not", "where", "on", "any", "all", "some", "exists", "from", "as", "is", "when", "then",
        "else", "select", "values", "row", "having", "using", "over", "filter",
    ];
    token.kind == TokenKind::Word && words.contains(&token.value.as_str())
}

fn word(token: &Token, w: &str) -> bool {
    token.kind == TokenKind::Word && token.value == w
}

/// Index of the parenthesis that closes the one at `open`; the end if none does.
fn closing(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0usize;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        depth += usize::from(symbol(token, "("));
        depth -= usize::from(symbol(token, ")"));
        if depth == 0 {
            return i;
        }
    }
    tokens.len()
}

fn scalar_select(group: &[Token]) -> bool {
    group.first().is_some_and(|t| word(t, "select")) && !reads(group)
}

/// A FROM of its own, not of a subselect in it.
fn reads(group: &[Token]) -> bool {
    let mut depth = 0i32;
    group.first().is_some_and(|t| word(t, "select"))
        && group.iter().any(|t| {
            depth += i32::from(symbol(t, "(")) - i32::from(symbol(t, ")"));
            depth == 0 && word(t, "from")
        })
}

/// Whether arguments name a column: a name that is no call, no schema of one, no type behind `::`, no constant.
fn names_columns(arguments: &[Token]) -> bool {
    let at = |i: usize| arguments.get(i);
    arguments.iter().enumerate().any(|(i, t)| {
        let called = at(i + 1).is_some_and(|n| symbol(n, "("));
        let schema = at(i + 1).is_some_and(|n| symbol(n, ".")) && at(i + 3).is_some_and(|n| symbol(n, "("));
        let cast = i.checked_sub(1).and_then(at).is_some_and(|p| symbol(p, ":"));
        let constant = t.kind == TokenKind::Word
            && ["true", "false", "null", "array", "select", "as", "current_user", "session_user"]
                .contains(&t.value.as_str());
        is_name(t) && !called && !schema && !cast && !constant
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bare(expression: &str) -> Vec<String> {
        bare_calls(expression).iter().map(Call::shown).collect()
    }

    #[test]
    fn calls_in_a_scalar_subselect_are_fine() {
        assert_eq!(bare("auth_user_id = auth.uid()"), ["auth.uid"]);
        assert!(bare("auth_user_id = (select auth.uid())").is_empty());
        assert!(bare("auth_user_id = ( SELECT auth.uid() AS uid)").is_empty());
        assert!(bare("a = ((select (current_setting('x') || auth.uid())))").is_empty());
        assert_eq!(bare("lower(name) = 'auth.uid()'"), ["lower"]);
        assert_eq!(bare("(auth.jwt() ->> 'a') = b"), ["auth.jwt"]);
    }

    #[test]
    fn a_subselect_that_reads_a_table_calls_for_each_of_its_rows() {
        assert_eq!(bare("x in (select y from s.z where auth.uid() = a)"), ["auth.uid"]);
        assert!(bare("x in (select y from s.z where (select auth.uid()) = a)").is_empty());
        assert_eq!(bare("a = (select f((select b from c where d = g())))"), ["g"]);
    }

    #[test]
    fn calls_with_a_column_are_told_apart_and_the_others_can_be_wrapped() {
        let expression = "s.member(t.id) and s.has('a'::text, auth.uid()) and x = auth.uid()";
        let calls = bare_calls(expression);
        let columns: Vec<bool> = calls.iter().map(|c| c.takes_columns).collect();
        assert_eq!((bare(expression).len(), columns), (4, vec![true, false, false, false]));
        assert_eq!(
            wrap(expression, &calls.iter().collect::<Vec<_>>()),
            "s.member(t.id) and (select s.has('a'::text, auth.uid())) and x = (select auth.uid())"
        );
    }

    #[test]
    fn an_expression_that_does_not_end_is_no_reason_to_fall() {
        for text in ["f(", "f(a", ")", "(select f(", "'"] {
            let _ = bare(text);
        }
    }

    #[test]
    fn called_functions_have_their_schema() {
        let found = called_functions("a = (select auth.uid()) and \"My\".\"F\"(lower(b)) and c.d = 1");
        assert_eq!(found, [("auth".to_owned(), "uid".to_owned()), ("My".to_owned(), "F".to_owned())]);
    }
}
