//! The password file, as libpq reads it: `host:port:database:user:password`, `*` matches all, `\` escapes.

use std::path::Path;

use secrecy::SecretString;

/// The password for this target in the file at `path`, if the file exists, is private and has a matching line.
pub(super) fn look_up(path: &Path, host: &str, port: u16, dbname: &str, user: &str) -> Option<SecretString> {
    use std::os::unix::fs::PermissionsExt as _;
    let meta = std::fs::metadata(path).ok()?;
    if !meta.is_file() || meta.permissions().mode() & 0o077 != 0 {
        tracing::warn!(file = %path.display(), "password file ignored: it must be a plain file with mode 0600");
        return None;
    }
    let text = std::fs::read_to_string(path).ok()?;
    find(&text, [host, &port.to_string(), dbname, user]).map(SecretString::from)
}

fn find(text: &str, wanted: [&str; 4]) -> Option<String> {
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = split(line);
        let [patterns @ .., password] = fields.as_slice() else { return None };
        let matches = patterns.len() == 4 && patterns.iter().zip(wanted).all(|(p, w)| p == "*" || p == w);
        (matches && !password.is_empty()).then(|| password.clone())
    })
}

/// At most five fields; the last one takes the rest of the line.
fn split(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        let c = match c {
            '\\' => chars.next(),
            ':' if fields.len() < 5 => {
                fields.push(String::new());
                continue;
            }
            c => Some(c),
        };
        if let Some(last) = fields.last_mut() {
            last.extend(c);
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_matching_line_wins() {
        let text = "# comment\nother:5432:*:app:no\ndb:*:*:app:a\\:b\\\\c\n*:*:*:*:last\n";
        assert_eq!(find(text, ["db", "5432", "x", "app"]).as_deref(), Some("a:b\\c"));
        assert_eq!(find(text, ["db", "5432", "x", "root"]).as_deref(), Some("last"));
        assert_eq!(find("db:5432:x", ["db", "5432", "x", "app"]), None);
    }

    #[test]
    fn a_file_others_can_read_is_ignored() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pgpass");
        std::fs::write(&path, "*:*:*:*:secret").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(look_up(&path, "h", 1, "d", "u").is_none());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(look_up(&path, "h", 1, "d", "u").is_some());
    }
}
