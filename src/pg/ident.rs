//! Identifiers as PostgreSQL reads and writes them. Everything that becomes SQL goes through [`Ident::sql`].

use std::fmt;
use std::str::FromStr;

/// Longest identifier in bytes: `NAMEDATALEN - 1`. The server cuts longer ones silently (hazard 38), we refuse them.
pub const MAX_IDENT_BYTES: usize = 63;

/// One identifier, unquoted, 1 to 63 bytes, without NUL.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ident(String);

impl Ident {
    /// Takes the name as it is (no folding, no unquoting).
    ///
    /// # Errors
    /// A sentence saying what is wrong, if the name is empty, longer than 63 bytes or holds a NUL.
    pub fn new(name: impl Into<String>) -> Result<Self, String> {
        let name = name.into();
        if name.is_empty() {
            return Err("an identifier cannot be empty".into());
        }
        if name.contains('\0') {
            return Err("an identifier cannot contain a NUL byte".into());
        }
        if name.len() > MAX_IDENT_BYTES {
            return Err(format!(
                "identifier {name:?} has {} bytes; PostgreSQL keeps {MAX_IDENT_BYTES} and cuts the rest silently",
                name.len()
            ));
        }
        Ok(Self(name))
    }

    /// The bare name, as stored in the catalog.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name quoted for SQL, always with double quotes.
    pub fn sql(&self) -> String {
        format!("\"{}\"", self.0.replace('"', "\"\""))
    }
}

impl fmt::Display for Ident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Parses one identifier as SQL writes it: `name` folds to lower case, `"Name"` is kept.
impl FromStr for Ident {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut parts = split_qualified(s)?;
        match (parts.pop(), parts.pop()) {
            (Some(one), None) => Ok(one),
            _ => Err(format!("expected one identifier, found {s:?}")),
        }
    }
}

/// A schema-qualified name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QualifiedName {
    /// The schema, unquoted.
    pub schema: Ident,
    /// The object's name, unquoted.
    pub name: Ident,
}

impl QualifiedName {
    /// `"schema"."name"`.
    pub fn sql(&self) -> String {
        format!("{}.{}", self.schema.sql(), self.name.sql())
    }
}

impl fmt::Display for QualifiedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

/// Parses `schema.name` with SQL's quoting and folding rules.
impl FromStr for QualifiedName {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let parts: [Ident; 2] = split_qualified(s)?.try_into().map_err(|found: Vec<Ident>| {
            format!(
                "expected a schema-qualified name such as public.messages, found {s:?} with {} part(s)",
                found.len()
            )
        })?;
        let [schema, name] = parts;
        Ok(Self { schema, name })
    }
}

/// Splits `a.b.c` into identifiers; unquoted parts fold to lower case, quoted ones are kept, `""` is a quote.
///
/// # Errors
/// A sentence naming the position of what cannot be read.
pub fn split_qualified(s: &str) -> Result<Vec<Ident>, String> {
    let mut out = Vec::new();
    let mut chars = s.char_indices().peekable();
    loop {
        let mut part = String::new();
        match chars.peek() {
            Some((_, '"')) => {
                chars.next();
                loop {
                    match chars.next() {
                        Some((_, '"')) if chars.peek().is_some_and(|(_, c)| *c == '"') => {
                            chars.next();
                            part.push('"');
                        }
                        Some((_, '"')) => break,
                        Some((_, c)) => part.push(c),
                        None => return Err(format!("unterminated quoted identifier in {s:?}")),
                    }
                }
            }
            Some((_, c)) if c.is_alphabetic() || *c == '_' || !c.is_ascii() => {
                while let Some((_, c)) = chars.peek().copied() {
                    if c.is_alphanumeric() || c == '_' || c == '$' || !c.is_ascii() {
                        // The server folds ASCII only in multi-byte encodings; so do we.
                        part.push(c.to_ascii_lowercase());
                        chars.next();
                    } else {
                        break;
                    }
                }
            }
            Some((i, c)) => return Err(format!("unexpected {c:?} at position {} in {s:?}", i + 1)),
            None => return Err(format!("expected an identifier at the end of {s:?}")),
        }
        out.push(Ident::new(part)?);
        match chars.next() {
            None => return Ok(out),
            Some((_, '.')) => {}
            Some((i, c)) => {
                return Err(format!("unexpected {c:?} at position {} in {s:?}; quote unusual names", i + 1));
            }
        }
    }
}

/// A string literal for SQL, safe whatever `standard_conforming_strings` is.
pub fn literal(s: &str) -> String {
    if s.contains('\\') {
        format!(" E'{}'", s.replace('\\', "\\\\").replace('\'', "''"))
    } else {
        format!("'{}'", s.replace('\'', "''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_fold_like_the_server_folds_them() {
        let q: QualifiedName = "Public.\"Weird \"\"Name\"".parse().expect("parses");
        assert_eq!((q.schema.as_str(), q.name.as_str()), ("public", "Weird \"Name"));
        assert_eq!(q.sql(), "\"public\".\"Weird \"\"Name\"");
    }

    #[test]
    fn injection_and_overlong_names_are_refused() {
        assert!("public.messages; drop table x".parse::<QualifiedName>().is_err());
        assert!("messages".parse::<QualifiedName>().is_err());
        assert!(Ident::new("x".repeat(64)).is_err());
        assert!(Ident::new("x".repeat(63)).is_ok());
    }

    proptest! {
        #[test]
        fn quoting_round_trips(a in "[^\0]{1,15}", b in "[^\0]{1,15}") {
            let q = QualifiedName { schema: Ident::new(a).unwrap(), name: Ident::new(b).unwrap() };
            prop_assert_eq!(q.sql().parse::<QualifiedName>().unwrap(), q);
        }
    }
}
