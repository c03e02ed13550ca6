//! Who may look: everybody on this machine; from elsewhere, whoever has the token.

use axum::http::{HeaderMap, header};
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};

/// What a request is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// What it asked for.
    Yes,
    /// 401: the token is missing or wrong.
    TokenWanted,
    /// 403: others reach this address, and no token is set.
    NotFromElsewhere,
}

/// The rule.
#[derive(Clone, Default)]
pub(super) struct Access {
    /// SHA-256 of the token. Digests are compared, so that the time it takes says nothing about the token.
    token: Option<[u8; 32]>,
    /// Only this machine reaches the address.
    is_local: bool,
}

impl Access {
    pub(super) fn new(token: Option<&SecretString>) -> Self {
        Self { token: token.map(|t| Sha256::digest(t.expose_secret()).into()), is_local: false }
    }

    #[must_use]
    pub(super) fn at(self, address: std::net::SocketAddr) -> Self {
        Self { is_local: address.ip().is_loopback(), ..self }
    }

    /// Whether others reach the address, and nothing protects it.
    pub(super) fn is_open(&self) -> bool {
        !self.is_local && self.token.is_none()
    }

    pub(super) fn answer(&self, path: &str, headers: &HeaderMap) -> Answer {
        match (&self.token, path) {
            // Orchestrators ask without a token, and learn nothing about the job.
            (_, "/healthz" | "/readyz") => Answer::Yes,
            (Some(token), _) if given(headers).is_some_and(|g| Sha256::digest(g)[..] == token[..]) => Answer::Yes,
            (Some(_), _) => Answer::TokenWanted,
            (None, "/metrics") => Answer::Yes,
            (None, _) if self.is_local => Answer::Yes,
            (None, _) => Answer::NotFromElsewhere,
        }
    }
}

/// The token of a request: a bearer token, or the password with which a browser asks.
fn given(headers: &HeaderMap) -> Option<Vec<u8>> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, rest) = value.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(rest.trim().as_bytes().to_vec());
    }
    if scheme.eq_ignore_ascii_case("basic") {
        let pair = decode_base64(rest.trim())?;
        let colon = pair.iter().position(|b| *b == b':')?;
        return Some(pair[colon + 1..].to_vec());
    }
    None
}

/// RFC 4648, as browsers send it.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let (mut out, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xFFFF;
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(access: &Access, path: &str, authorization: &str) -> Answer {
        let mut headers = HeaderMap::new();
        if !authorization.is_empty() {
            headers.insert(header::AUTHORIZATION, authorization.parse().unwrap());
        }
        access.answer(path, &headers)
    }

    #[test]
    fn with_a_token_only_health_goes_without_it() {
        let access = Access::new(Some(&"sesame".into())).at("0.0.0.0:1".parse().unwrap());
        for path in ["/", "/api/v1/status", "/metrics", "/page.js"] {
            // printf 'me:sesame' | base64
            for good in ["Bearer sesame", "bearer sesame", "Basic bWU6c2VzYW1l"] {
                assert_eq!(asked(&access, path, good), Answer::Yes, "{path} {good}");
            }
            for bad in ["", "Bearer sesam", "Bearer sesame2", "Bearer", "Basic bWU6", "Basic ***", "Digest sesame"] {
                assert_eq!(asked(&access, path, bad), Answer::TokenWanted, "{path} {bad}");
            }
        }
        assert_eq!(asked(&access, "/healthz", ""), Answer::Yes);
    }

    #[test]
    fn without_one_the_page_is_for_this_machine_alone() {
        let (here, elsewhere) = ("127.0.0.1:1".parse().unwrap(), "0.0.0.0:1".parse().unwrap());
        let access = Access::new(None);
        assert_eq!(asked(&access.clone().at(here), "/", ""), Answer::Yes);
        for path in ["/", "/api/v1/status", "/page.js"] {
            assert_eq!(asked(&access.clone().at(elsewhere), path, ""), Answer::NotFromElsewhere);
        }
        for path in ["/metrics", "/healthz", "/readyz"] {
            assert_eq!(asked(&access.clone().at(elsewhere), path, ""), Answer::Yes);
        }
    }
}
