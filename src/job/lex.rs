//! A small SQL lexer: enough to split a file into statements and to find `alias.column` references in an expression.
//! It does not judge SQL; the server does, when the statement is prepared.

/// What a token is. Comments and white space are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// An unquoted word: keyword, identifier or alias.
    Word,
    /// A `"quoted"` identifier.
    Quoted,
    /// Any string constant, dollar-quoted ones included.
    Str,
    /// A number.
    Number,
    /// One character of punctuation or of an operator.
    Symbol,
}

/// A token with its place in the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// What it is.
    pub kind: TokenKind,
    /// Its value: identifiers folded or unquoted, everything else as written.
    pub value: String,
    /// Byte offset of its first character.
    pub start: usize,
    /// Byte offset behind its last character.
    pub end: usize,
}

impl Token {
    fn is_symbol(&self, c: char) -> bool {
        self.kind == TokenKind::Symbol && self.value.len() == c.len_utf8() && self.value.starts_with(c)
    }

    fn is_word(&self, word: &str) -> bool {
        self.kind == TokenKind::Word && self.value == word
    }

    fn is_name(&self) -> bool {
        matches!(self.kind, TokenKind::Word | TokenKind::Quoted)
    }
}

/// Splits SQL text into tokens.
///
/// # Errors
/// A sentence with the byte position of an unterminated string, identifier or comment.
pub fn tokens(sql: &str) -> Result<Vec<Token>, String> {
    let mut out = Vec::new();
    let mut at = 0;
    while let Some(c) = sql[at..].chars().next() {
        let rest = &sql[at..];
        let start = at;
        if c.is_whitespace() {
            at += c.len_utf8();
        } else if rest.starts_with("--") {
            at += rest.find('\n').unwrap_or(rest.len());
        } else if rest.starts_with("/*") {
            at += block_comment(rest).ok_or_else(|| format!("unterminated comment at byte {start}"))?;
        } else if c == '\'' || is_prefixed_string(rest) {
            at += string(rest).ok_or_else(|| format!("unterminated string at byte {start}"))?;
            push(&mut out, TokenKind::Str, &sql[start..at], start, at);
        } else if c == '"' {
            let (len, name) = quoted(rest).ok_or_else(|| format!("unterminated identifier at byte {start}"))?;
            at += len;
            push(&mut out, TokenKind::Quoted, &name, start, at);
        } else if let Some(len) = dollar_string(rest) {
            at += len.ok_or_else(|| format!("unterminated dollar-quoted string at byte {start}"))?;
            push(&mut out, TokenKind::Str, &sql[start..at], start, at);
        } else if c.is_alphabetic() || c == '_' {
            at += rest.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '$')).unwrap_or(rest.len());
            push(&mut out, TokenKind::Word, &sql[start..at].to_ascii_lowercase(), start, at);
        } else if c.is_ascii_digit() {
            at += rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '.' || c == '_')).unwrap_or(rest.len());
            push(&mut out, TokenKind::Number, &sql[start..at], start, at);
        } else {
            at += c.len_utf8();
            push(&mut out, TokenKind::Symbol, &sql[start..at], start, at);
        }
    }
    Ok(out)
}

fn push(out: &mut Vec<Token>, kind: TokenKind, value: &str, start: usize, end: usize) {
    out.push(Token { kind, value: value.to_owned(), start, end });
}

fn block_comment(s: &str) -> Option<usize> {
    let (mut depth, mut at) = (0usize, 0usize);
    let bytes = s.as_bytes();
    while at + 1 < bytes.len() {
        match &bytes[at..at + 2] {
            b"/*" => (depth, at) = (depth + 1, at + 2),
            b"*/" => {
                (depth, at) = (depth - 1, at + 2);
                if depth == 0 {
                    return Some(at);
                }
            }
            _ => at += 1,
        }
    }
    None
}

fn is_prefixed_string(s: &str) -> bool {
    let lower: String = s.chars().take(3).flat_map(char::to_lowercase).collect();
    ["e'", "b'", "x'", "n'", "u&'"].iter().any(|p| lower.starts_with(p))
}

fn string(s: &str) -> Option<usize> {
    let open = s.find('\'')?;
    let escapes = s[..open].eq_ignore_ascii_case("e");
    let bytes = s.as_bytes();
    let mut at = open + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if escapes => at += 2,
            b'\'' if bytes.get(at + 1) == Some(&b'\'') => at += 2,
            b'\'' => return Some(at + 1),
            _ => at += 1,
        }
    }
    None
}

fn quoted(s: &str) -> Option<(usize, String)> {
    let mut name = String::new();
    let mut chars = s.char_indices().skip(1).peekable();
    while let Some((i, c)) = chars.next() {
        match c {
            '"' if chars.peek().is_some_and(|(_, n)| *n == '"') => {
                chars.next();
                name.push('"');
            }
            '"' => return Some((i + 1, name)),
            c => name.push(c),
        }
    }
    None
}

/// `None`: not a dollar quote. `Some(None)`: one that does not end.
fn dollar_string(s: &str) -> Option<Option<usize>> {
    let body = s.strip_prefix('$')?;
    let tag_len = body.find('$')?;
    let tag = &body[..tag_len];
    if tag.starts_with(|c: char| c.is_ascii_digit()) || !tag.chars().all(|c| c.is_alphanumeric() || c == '_') {
        return None;
    }
    let delimiter = &s[..tag_len + 2];
    Some(s[delimiter.len()..].find(delimiter).map(|i| i + 2 * delimiter.len()))
}

/// Splits a file into its statements, without the semicolons; knows strings, comments and `begin atomic` bodies.
///
/// # Errors
/// As [`tokens`].
pub fn split_statements(sql: &str) -> Result<Vec<String>, String> {
    let tokens = tokens(sql)?;
    let mut out = Vec::new();
    let (mut from, mut depth) = (None, 0usize);
    for (i, token) in tokens.iter().enumerate() {
        from.get_or_insert(token.start);
        let atomic = token.is_word("atomic") && i > 0 && tokens[i - 1].is_word("begin");
        if atomic || (depth > 0 && token.is_word("case")) {
            depth += 1;
        } else if depth > 0 && token.is_word("end") {
            depth -= 1;
        } else if depth == 0 && token.is_symbol(';') {
            let start = from.take().unwrap_or(token.start);
            if start < token.start {
                out.push(sql[start..token.start].trim().to_owned());
            }
        }
    }
    if let Some(start) = from {
        out.push(sql[start..].trim().to_owned());
    }
    Ok(out)
}

/// The first words of a statement, lower-cased, for telling what kind it is.
///
/// # Errors
/// As [`tokens`].
pub fn leading_words(sql: &str, n: usize) -> Result<Vec<String>, String> {
    Ok(tokens(sql)?.into_iter().take_while(|t| t.kind == TokenKind::Word).take(n).map(|t| t.value).collect())
}

/// A reference `alias.column` in an expression.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    /// The table alias.
    pub alias: String,
    /// The column, unquoted.
    pub column: String,
}

/// All references to columns of `aliases` in an expression, in order of appearance, without repetition.
///
/// # Errors
/// A sentence, if an alias is used as a whole row (`c` or `c.*`): then nobody can tell on which columns the value
/// depends, and the sync triggers could miss a change.
pub fn references(expr: &str, aliases: &[&str]) -> Result<Vec<Reference>, String> {
    let tokens = tokens(expr)?;
    let mut out: Vec<Reference> = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        let after_dot = i > 0 && tokens[i - 1].is_symbol('.');
        if !token.is_name() || after_dot || !aliases.contains(&token.value.as_str()) {
            continue;
        }
        let next = |n: usize| tokens.get(i + n);
        if next(1).is_some_and(|t| t.is_symbol('(')) {
            continue;
        }
        let column = next(2).filter(|t| t.is_name() && next(1).is_some_and(|dot| dot.is_symbol('.')));
        let Some(column) = column else {
            return Err(format!("{:?} is used as a whole row; name its columns: {}.column", token.value, token.value));
        };
        // alias.column( would be a function in a schema that is named like the alias
        if next(3).is_some_and(|t| t.is_symbol('(')) {
            continue;
        }
        let reference = Reference { alias: token.value.clone(), column: column.value.clone() };
        if !out.contains(&reference) {
            out.push(reference);
        }
    }
    Ok(out)
}

/// Calls of functions with a schema, as (schema, name): `app.normalize(...)`.
pub fn qualified_calls(expr: &str) -> Vec<(String, String)> {
    let tokens = tokens(expr).unwrap_or_default();
    let call = |w: &[Token]| {
        let found = w[0].is_name() && w[1].is_symbol('.') && w[2].is_name() && w[3].is_symbol('(');
        found.then(|| (w[0].value.clone(), w[2].value.clone()))
    };
    tokens.windows(4).filter_map(call).collect()
}

/// `Some` if the expression is nothing but one `alias.column`.
pub fn plain_reference(expr: &str) -> Option<Reference> {
    match tokens(expr).ok()?.as_slice() {
        [alias, dot, column] if alias.is_name() && dot.is_symbol('.') && column.is_name() => {
            Some(Reference { alias: alias.value.clone(), column: column.value.clone() })
        }
        _ => None,
    }
}

/// Whether the expression only chooses between columns: references, `coalesce`, `nullif`, `case` over `is null` and truth
/// values. Nothing in it computes or converts text, so it cannot raise, and no session setting changes it.
pub fn only_chooses(expr: &str) -> bool {
    const WORDS: [&str; 13] =
        ["coalesce", "nullif", "case", "when", "then", "else", "end", "is", "not", "null", "and", "or", "true"];
    let Ok(tokens) = tokens(expr) else { return false };
    tokens.iter().enumerate().all(|(i, t)| {
        let dotted = |n: Option<usize>| n.and_then(|n| tokens.get(n)).is_some_and(|t| t.is_symbol('.'));
        match t.kind {
            TokenKind::Word | TokenKind::Quoted if dotted(i.checked_sub(1)) || dotted(Some(i + 1)) => {
                !tokens.get(i + 1).is_some_and(|t| t.is_symbol('('))
            }
            TokenKind::Word => WORDS.contains(&t.value.as_str()) || t.value == "false",
            TokenKind::Number => true,
            TokenKind::Symbol => matches!(t.value.as_str(), "." | "," | "(" | ")"),
            TokenKind::Quoted | TokenKind::Str => false,
        }
    })
}

/// Whether the text is one expression that cannot end the place it is put in: balanced, no semicolon, no comment that
/// would swallow what follows, no positional parameter.
///
/// # Errors
/// A sentence saying what is wrong.
pub fn check_expression(expr: &str) -> Result<(), String> {
    let tokens = tokens(expr)?;
    if tokens.is_empty() {
        return Err("the expression is empty".into());
    }
    let mut open = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        if token.kind != TokenKind::Symbol {
            continue;
        }
        match token.value.as_str() {
            ";" => return Err("an expression cannot contain a semicolon".into()),
            "(" => open.push(')'),
            "[" => open.push(']'),
            c @ (")" | "]") if open.pop() != c.chars().next() => {
                return Err(format!("unbalanced {c:?} at byte {}", token.start));
            }
            "$" if tokens.get(i + 1).is_some_and(|t| t.kind == TokenKind::Number) => {
                return Err("parameters such as $1 are not available in a job's expressions".into());
            }
            _ => {}
        }
    }
    match open.pop() {
        Some(c) => Err(format!("missing {c:?} at the end")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn statements_split_outside_strings_comments_and_bodies() {
        let sql = "create function f() returns text language sql as $x$ select ';' $x$; -- a; b\n\
                   comment on function f() is 'a;''b';\n\
                   create function g() returns int language sql begin atomic select case when true then 1 end; end;";
        let parts = split_statements(sql).expect("splits");
        assert_eq!(parts.len(), 3, "{parts:?}");
        assert!(parts[2].ends_with("end"));
    }

    #[test]
    fn references_are_found_and_functions_are_not() {
        let found = references(
            "coalesce(t.\"AccountId\", lower(p.name), public.f(1), 'c.x', extract(epoch from c.at))",
            &["t", "p", "c"],
        )
        .expect("parses");
        let names: Vec<String> = found.iter().map(|r| format!("{}.{}", r.alias, r.column)).collect();
        assert_eq!(names, ["t.AccountId", "p.name", "c.at"]);
        assert!(references("row_to_json(c)", &["c"]).is_err());
        assert!(references("count(c.*)", &["c"]).is_err());
    }

    #[test]
    fn calls_with_a_schema_are_found() {
        let calls = qualified_calls("coalesce(app.f(c.x), \"App\".\"G\"(c.y), c.z, lower(c.f))");
        assert_eq!(calls, [("app".to_owned(), "f".to_owned()), ("App".to_owned(), "G".to_owned())]);
    }

    #[test]
    fn expressions_that_only_choose_are_told_from_those_that_compute() {
        for expr in [
            "c.x",
            "coalesce(t.\"A\", p.b, 0)",
            "case when c.x is not null and t.flag then c.y else nullif(t.a, 1) end",
        ] {
            assert!(only_chooses(expr), "{expr}");
        }
        for expr in [
            "lower(c.x)",
            "c.x || 'y'",
            "c.x::text",
            "coalesce(c.x, 'today')",
            "public.f(c.x)",
            "c.a / c.b",
            "c.x = t.y",
            "-c.x",
        ] {
            assert!(!only_chooses(expr), "{expr}");
        }
    }

    #[test]
    fn expressions_cannot_escape() {
        assert!(check_expression("c.x); drop table y; --").is_err());
        assert!(check_expression("c.x) + (1").is_err());
        assert!(check_expression("$1").is_err());
        assert!(check_expression("coalesce(c.a[1], 'x;y')").is_ok());
        assert!(check_expression("  ").is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_lexed_or_refused_without_panic(s in "\\PC{0,60}") {
            let _ = split_statements(&s);
            let _ = references(&s, &["t"]);
            let _ = check_expression(&s);
        }
    }
}
