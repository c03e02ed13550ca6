//! Connection strings as libpq and its relatives write them: URLs and key/value strings. Pure.
//!
//! Errors never quote the text: where a string cannot be parsed, any piece of it may be part of the password.

use std::collections::BTreeMap;

/// Keyword to value. `host`, `hostaddr` and `port` may be comma-separated lists.
pub(super) type Params = BTreeMap<String, String>;

/// What we act on.
const USED: [&str; 26] = [
    "channel_binding",
    "connect_timeout",
    "dbname",
    "host",
    "hostaddr",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "load_balance_hosts",
    "options",
    "passfile",
    "password",
    "pgbouncer",
    "port",
    "service",
    "servicefile",
    "ssl_min_protocol_version",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslnegotiation",
    "sslrootcert",
    "target_session_attrs",
    "tcp_user_timeout",
    "user",
];

/// Accepted and left alone: we set it ourselves, it has no effect here, or it belongs to another client's pool.
const IGNORED: [&str; 22] = [
    "application_name",
    "client_encoding",
    "connection_limit",
    "currentschema",
    "fallback_application_name",
    "gssdelegation",
    "gssencmode",
    "gsslib",
    "krbsrvname",
    "max_connections",
    "pool_max_conns",
    "pool_timeout",
    "prepared_statements",
    "prepared_statement_cache_queries",
    "schema",
    "socket_timeout",
    "ssl_max_protocol_version",
    "sslcompression",
    "sslsni",
    "statement_cache_size",
    "statement_cache_capacity",
    "supa",
];

/// What libpq knows and we do not; ignoring it would weaken what the operator asked for.
const REFUSED: [(&str, &str); 8] = [
    ("require_auth", "restricting authentication methods is not supported"),
    ("replication", "a replication connection cannot run a backfill"),
    ("requirepeer", "checking the server's operating system user is not supported"),
    ("sslcertmode", "give sslcert and sslkey, or leave them out"),
    ("sslcrl", "certificate revocation lists are not supported"),
    ("sslcrldir", "certificate revocation lists are not supported"),
    ("sslpassword", "encrypted private keys are not supported; decrypt the key file"),
    ("oauth_issuer", "OAuth authentication is not supported"),
];

const PERCENT: &str = "percent-encode special characters in user and password (@ is %40, / is %2F, ? is %3F, # is %23)";

/// Parses a connection string.
///
/// # Errors
/// A sentence that names the parameter, but never a value.
pub(super) fn parse(text: &str) -> Result<Params, String> {
    let text = text.trim();
    let pairs = match url_rest(text) {
        Some(rest) => parse_url(rest)?,
        None if text.contains("://") => {
            return Err("expected a URL that begins with postgresql:// or postgres://".into());
        }
        None => parse_key_value(text)?,
    };
    accept(pairs)
}

/// Why a parameter of libpq's is refused, if it is.
pub(super) fn refusal(param: &str) -> Option<&'static str> {
    REFUSED.iter().find(|(name, _)| *name == param).map(|(_, why)| *why)
}

/// Parameters by name, without those that mean nothing here.
///
/// # Errors
/// As [`parse`].
pub(super) fn accept(pairs: Vec<(String, String)>) -> Result<Params, String> {
    let mut params = Params::new();
    for (key, value) in pairs {
        // JDBC writes some names in camel case; `ssl=true` is JDBC's and libpq's old way to say require.
        let (key, value) = match key.to_ascii_lowercase().as_str() {
            "ssl" if value == "true" => ("sslmode".to_owned(), "require".to_owned()),
            lower => (lower.to_owned(), value),
        };
        if let Some(why) = refusal(&key) {
            return Err(format!("parameter `{key}`: {why}"));
        }
        if key == "gssencmode" && value == "require" {
            return Err("parameter `gssencmode`: GSSAPI encryption is not supported".into());
        }
        if IGNORED.contains(&key.as_str()) {
            continue;
        }
        if !USED.contains(&key.as_str()) {
            return Err(format!("unknown parameter `{}`", printable(&key)));
        }
        // An empty value means "not given", as in libpq.
        if !value.is_empty() {
            params.insert(key, value);
        }
    }
    Ok(params)
}

/// Whether there is a password in it.
pub(super) fn has_password(text: &str) -> bool {
    // One that cannot be read may have one.
    parse(text).map_or(text.contains("password") || text.contains('@'), |p| p.contains_key("password"))
}

/// The same string with `***` for its password, or only `***` if it cannot be parsed.
pub(super) fn redact(text: &str) -> String {
    if parse(text).is_err() {
        return "***".into();
    }
    let Some(rest) = url_rest(text.trim()) else {
        let pairs = parse_key_value(text).unwrap_or_default();
        let shown = pairs.into_iter().map(|(k, v)| {
            let v = if k == "password" { "***".into() } else { v };
            if v.is_empty() || v.contains([' ', '\'', '\\']) {
                format!("{k}='{}'", v.replace('\\', "\\\\").replace('\'', "\\'"))
            } else {
                format!("{k}={v}")
            }
        });
        return shown.collect::<Vec<_>>().join(" ");
    };
    let parts = split_url(rest);
    let mut out = String::from("postgresql://");
    if let Some(credentials) = parts.credentials {
        let user = credentials.split(':').next().unwrap_or_default();
        out.push_str(user);
        if credentials.contains(':') {
            out.push_str(":***");
        }
        out.push('@');
    }
    out.push_str(parts.hosts);
    if let Some(path) = parts.path {
        out.push('/');
        out.push_str(path);
    }
    if let Some(query) = parts.query {
        let shown = query.split('&').map(|pair| match pair.split_once('=') {
            Some((key, _)) if decode(key).is_ok_and(|k| k == "password") => "password=***".to_owned(),
            _ => pair.to_owned(),
        });
        out.push('?');
        out.push_str(&shown.collect::<Vec<_>>().join("&"));
    }
    out
}

fn url_rest(text: &str) -> Option<&str> {
    text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://"))
}

/// A parameter name may be shown if it looks like one; anything else could be a piece of a password.
fn printable(key: &str) -> &str {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.' || c == '-';
    if key.len() <= 40 && key.chars().all(plain) { key } else { "(not a parameter name)" }
}

struct UrlParts<'a> {
    credentials: Option<&'a str>,
    hosts: &'a str,
    path: Option<&'a str>,
    query: Option<&'a str>,
}

fn split_url(rest: &str) -> UrlParts<'_> {
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, Some(query)),
        None => (rest, None),
    };
    let (authority, path) = match rest.split_once('/') {
        Some((authority, path)) => (authority, Some(path)),
        None => (rest, None),
    };
    // The last @ ends the credentials, so that a raw @ in a password works; libpq would take the first.
    let (credentials, hosts) = match authority.rsplit_once('@') {
        Some((credentials, hosts)) => (Some(credentials), hosts),
        None => (None, authority),
    };
    UrlParts { credentials, hosts, path, query }
}

fn parse_url(rest: &str) -> Result<Vec<(String, String)>, String> {
    let parts = split_url(rest);
    let cut = parts.credentials.is_none() && parts.hosts.contains(':');
    let raw_at = |part: Option<&str>| part.is_some_and(|p| p.contains('@'));
    if raw_at(parts.path) || (cut && raw_at(parts.query)) {
        return Err(format!("the URL's password holds a raw / or ?; {PERCENT}"));
    }
    let mut out = Vec::new();
    if let Some(credentials) = parts.credentials {
        let (user, password) = match credentials.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (credentials, None),
        };
        out.push(("user".to_owned(), decode(user)?));
        if let Some(password) = password {
            out.push(("password".to_owned(), decode(password)?));
        }
    }
    let (hosts, ports) = parse_hosts(parts.hosts)?;
    if hosts.iter().any(|h| !h.is_empty()) {
        out.push(("host".to_owned(), hosts.join(",")));
    }
    if ports.iter().any(|p| !p.is_empty()) {
        out.push(("port".to_owned(), ports.join(",")));
    }
    if let Some(path) = parts.path {
        out.push(("dbname".to_owned(), decode(path)?));
    }
    for pair in parts.query.unwrap_or_default().split('&').filter(|p| !p.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or("a parameter in the URL has no value (expected name=value)")?;
        out.push((decode(key)?, decode(value)?));
    }
    Ok(out)
}

fn parse_hosts(text: &str) -> Result<(Vec<String>, Vec<String>), String> {
    let mut hosts = Vec::new();
    let mut ports = Vec::new();
    for chunk in text.split(',') {
        let (host, port) = match chunk.strip_prefix('[').map(|c| c.split_once(']')) {
            Some(Some((host, ""))) => (host, ""),
            Some(Some((host, port))) if port.starts_with(':') => (host, &port[1..]),
            Some(_) => return Err("the URL's IPv6 address is not closed by ]".into()),
            None => chunk.split_once(':').unwrap_or((chunk, "")),
        };
        if !port.is_empty() && port.parse::<u16>().is_err() {
            return Err(format!("the URL's port is not a number from 1 to 65535; {PERCENT}"));
        }
        hosts.push(decode(host)?);
        ports.push(port.to_owned());
    }
    Ok((hosts, ports))
}

fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let hex = rest.get(..2).and_then(|h| std::str::from_utf8(h).ok());
        let byte = hex.and_then(|h| u8::from_str_radix(h, 16).ok()).filter(|b| *b != 0);
        bytes.push(byte.ok_or_else(|| format!("the URL holds a % that begins no percent-encoded byte; {PERCENT}"))?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).map_err(|_| "the URL is not UTF-8 after percent-decoding".into())
}

/// `key = value` pairs; values may be in single quotes, `\` escapes.
fn parse_key_value(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut out = Vec::new();
    let mut chars = text.trim().chars().peekable();
    while chars.peek().is_some() {
        let mut key = String::new();
        while let Some(c) = chars.next_if(|c| *c != '=' && !c.is_whitespace()) {
            key.push(c);
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.next() != Some('=') || key.is_empty() {
            return Err("expected a postgresql:// URL or pairs like host=... user=... dbname=...".into());
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        let quoted = chars.next_if_eq(&'\'').is_some();
        let mut value = String::new();
        loop {
            match chars.next() {
                Some('\\') => value.extend(chars.next()),
                Some('\'') if quoted => break,
                Some(c) if !quoted && c.is_whitespace() => break,
                Some(c) => value.push(c),
                None if quoted => return Err(format!("parameter `{}`: the quote is not closed", printable(&key))),
                None => break,
            }
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        out.push((key, value));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(text: &str, key: &str) -> Option<String> {
        parse(text).expect("parses").remove(key)
    }

    #[test]
    fn urls_of_other_clients_are_understood() {
        let url = "postgres://app.ref:p%40ss@pooler.example.com:6543/postgres?pgbouncer=true&connection_limit=1\
                   &sslmode=verify-full&sslrootcert=/etc/ca.crt&application_name=x&channel_binding=require";
        assert_eq!(get(url, "user").as_deref(), Some("app.ref"));
        assert_eq!(get(url, "password").as_deref(), Some("p@ss"));
        assert_eq!(get(url, "sslmode").as_deref(), Some("verify-full"));
        assert_eq!(get(url, "pgbouncer").as_deref(), Some("true"));
        assert_eq!(get(url, "application_name"), None);
        assert_eq!(get("postgresql:///app?host=/run/postgresql", "host").as_deref(), Some("/run/postgresql"));
        assert_eq!(get("postgresql://%2Frun%2Fpg/app", "host").as_deref(), Some("/run/pg"));
    }

    #[test]
    fn several_hosts_and_ipv6_keep_their_ports() {
        let url = "postgresql://u@a:1,b,[::1]:3/d?target_session_attrs=read-write";
        assert_eq!(get(url, "host").as_deref(), Some("a,b,::1"));
        assert_eq!(get(url, "port").as_deref(), Some("1,,3"));
        assert_eq!(get("host=a,b port=1,2", "port").as_deref(), Some("1,2"));
    }

    #[test]
    fn key_value_strings_are_unquoted() {
        let text = r"host = 'db 1' password='it\'s \\ secret' dbname=app user=''";
        assert_eq!(get(text, "password").as_deref(), Some(r"it's \ secret"));
        assert_eq!(get(text, "host").as_deref(), Some("db 1"));
        assert_eq!(get(text, "user"), None);
    }

    #[test]
    fn unknown_parameters_are_named() {
        let e = parse("postgresql://h/d?sslmod=require").expect_err("unknown");
        assert_eq!(e, "unknown parameter `sslmod`");
        assert!(parse("postgresql://h/d?sslcrl=/x").expect_err("refused").contains("revocation"));
    }

    #[test]
    fn what_cannot_be_parsed_is_never_quoted() {
        for text in [
            "postgresql://u:hunter/2secret@h/d",
            "postgresql://u:hunter?2secret@h/d",
            "postgresql://u:hunter?2secret=x@h/d",
            "postgresql://u:hunter%2secret@h/d",
            "postgresql://u:hunter2secret",
            "mysql://u:hunter2secret@h/d",
            "user=u password='hunter2secret",
            "u:hunter2secret@h",
        ] {
            let e = parse(text).expect_err(text);
            assert!(!e.contains("secret") && !e.contains("hunter"), "{text}: {e}");
            assert_eq!(redact(text), "***", "{text}");
        }
    }

    #[test]
    fn redaction_keeps_everything_but_the_password() {
        assert_eq!(redact("postgres://u:a@b:c@h:1/d?sslmode=require"), "postgresql://u:***@h:1/d?sslmode=require");
        assert_eq!(
            redact("postgres://h/d?user=u&password=x&sslmode=require"),
            "postgresql://h/d?user=u&password=***&sslmode=require"
        );
        assert_eq!(redact("host=h password=x options='-c a=b'"), "host=h password=*** options='-c a=b'");
    }

    proptest::proptest! {
        #[test]
        fn no_password_survives_redaction(password in "[^%]{0,20}q7Zx[^%]{0,20}") {
            let url = format!("postgresql://u:{password}@h/d");
            let shown = redact(&url);
            // With a raw ? the rest of the password can be a well-formed parameter.
            proptest::prop_assume!(!password.contains('?'));
            proptest::prop_assert!(!shown.contains("q7Zx"), "{}", shown);
        }
    }
}
