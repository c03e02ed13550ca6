//! Why a connection failed, in the operator's words: what, where, and the setting that would fix it.

use std::error::Error as StdError;
use std::io;
use std::time::Duration;

use rustls::CertificateError;

use crate::error::{Error, Kind};
use crate::settings::{HostSpec, Target};

/// Where we tried to connect.
pub(super) struct Place<'a> {
    pub(super) host: &'a HostSpec,
    pub(super) target: &'a Target,
}

impl Place<'_> {
    fn error(&self, reason: &str) -> Error {
        let (host, t) = (self.host, self.target);
        Error::new(Kind::Connect, format!("cannot connect to {host} as {}, database {}: {reason}", t.user, t.dbname))
    }
}

/// The attempt took longer than the settings allow.
pub(super) fn timed_out(place: &Place<'_>, limit: Duration) -> Error {
    place.error(&format!("no answer within {}", humantime::format_duration(limit))).with_hint(
        "check host and port, firewalls and security groups, and that a pooler in between has server connections left \
                    (its pool size); database.connect_timeout sets the limit",
    )
}

/// One error for several hosts.
pub(super) fn summary(mut failed: Vec<Error>) -> Error {
    let Some(last) = failed.pop() else { return Error::internal("there is no host to connect to") };
    if failed.is_empty() {
        return last;
    }
    failed.push(last);
    let reasons: Vec<String> = failed.iter().map(ToString::to_string).collect();
    let error =
        Error::new(Kind::Connect, format!("none of {} hosts can be used: {}", failed.len(), reasons.join("; ")));
    let sqlstate = failed.iter().rev().find_map(|e| e.sqlstate()).map(str::to_owned);
    let hint = failed.iter().rev().find_map(|e| e.hint()).map(str::to_owned);
    let error = match sqlstate {
        Some(state) => error.with_sqlstate(state),
        None => error,
    };
    match hint {
        Some(hint) => error.with_hint(hint),
        None => error,
    }
}

/// Whether the TLS handshake failed, so that it is worth trying without (for prefer) or with TLS (for allow).
pub(super) fn is_tls(error: &tokio_postgres::Error) -> bool {
    find::<rustls::Error>(error).is_some() || error.to_string().contains("TLS handshake")
}

/// Turns the driver's error into ours.
pub(super) fn explain(error: &tokio_postgres::Error, place: &Place<'_>) -> Error {
    if let Some(db) = error.as_db_error() {
        let code = db.code().code();
        let e = place.error(db.message()).with_sqlstate(code);
        return match refusal_hint(code, db.message(), place) {
            Some(hint) => e.with_hint(hint),
            None => e,
        };
    }
    if let Some(e) = find::<rustls::Error>(error) {
        let (reason, hint) = tls_reason(e, place);
        return place.error(&reason).with_hint(hint);
    }
    if place.target.tls.direct && (is_tls(error) || error.is_closed()) {
        return place.error("the server ends the connection instead of speaking TLS at once").with_hint(DIRECT_HINT);
    }
    let text = innermost(error);
    if is_tls(error) {
        let hint = "the server has TLS switched off, or a proxy in front of it has; switch it on, or set database.sslmode \
                    to disable where the network is trusted";
        return place.error(&text).with_hint(hint);
    }
    if let Some(e) = find::<io::Error>(error) {
        let (reason, hint) = network_reason(e, place);
        return place.error(&reason).with_hint(hint);
    }
    let hint = match text.as_str() {
        "password missing" => Some(PASSWORD_HINT),
        "server did not use channel binding" => {
            Some("channel_binding=require needs TLS, SCRAM and no proxy that ends TLS; use prefer otherwise")
        }
        "unsupported authentication method" => Some(
            "the server asks for GSSAPI, SSPI, LDAP or another method we lack; give this role scram-sha-256 in pg_hba.conf",
        ),
        _ if error.is_closed() => Some(CLOSED_HINT),
        _ => None,
    };
    let reason = if text == "password missing" { "the server asks for a password and there is none" } else { &text };
    let e = place.error(reason);
    match hint {
        Some(hint) => e.with_hint(hint),
        None => e,
    }
}

const PASSWORD_HINT: &str =
    "set database.password_file, BACKFILLD_DATABASE__PASSWORD, PGPASSWORD, or a line in ~/.pgpass (mode 0600)";
const DIRECT_HINT: &str = "sslnegotiation=direct needs PostgreSQL 17 or later with TLS, and no pooler or proxy in between that \
                           lacks it; leave it out to ask for TLS first";
const CLOSED_HINT: &str = "the server or a proxy hung up before the login was done; its log has the reason. Check that the port is \
                           PostgreSQL's, and that a pooler in between knows this database and role";

fn refusal_hint(code: &str, message: &str, place: &Place<'_>) -> Option<String> {
    let t = place.target;
    Some(match code {
        "28P01" => format!("the password for {} is wrong, expired or not set on the server; {PASSWORD_HINT}", t.user),
        "28000" => "the server's pg_hba.conf must have a line for this address, role, database and kind of encryption \
                    (database.sslmode), and the role must exist with LOGIN"
            .into(),
        "3D000" => format!("check database.name (or the URL's path): {:?} does not exist on this server", t.dbname),
        "53300" => {
            "every connection is in use: lower database.pool_size, close idle connections, or raise the role's or \
                    the server's connection limit"
                .into()
        }
        "57P03" => "the server is starting up, shutting down or recovering; try again shortly".into(),
        "42501" => "the role needs CONNECT on the database".into(),
        // pgbouncer answers 08P01 for unknown users, databases and startup parameters.
        "08P01" => {
            "a pooler in between refuses this; check that it knows the database and role, and leave `options` out \
                    of the connection string"
                .into()
        }
        "XX000" if message.contains("Tenant") => {
            "Supabase's pooler finds the project by the role's name: use postgres.<project reference> as the user"
                .into()
        }
        _ => return None,
    })
}

fn tls_reason(error: &rustls::Error, place: &Place<'_>) -> (String, String) {
    use CertificateError as C;
    let host = &place.host.host;
    let rustls::Error::InvalidCertificate(cert) = error else {
        return other_tls_reason(error);
    };
    match cert {
        C::UnknownIssuer | C::BadSignature => (
            "the server's certificate is signed by an authority that is not trusted here".into(),
            "set database.sslrootcert to the authority's PEM file. Hosted servers have their own: Supabase's is under \
             Database Settings > SSL Configuration, Amazon's is the RDS global bundle"
                .into(),
        ),
        C::NotValidForName | C::NotValidForNameContext { .. } => {
            let names = match cert {
                C::NotValidForNameContext { presented, .. } if !presented.is_empty() => presented.join(", "),
                _ => "other names".into(),
            };
            (
                format!("the server's certificate is not for {host} but for {names}"),
                "connect to a name that is in the certificate (with hostaddr for the address, if names do not resolve), \
                 or use sslmode=verify-ca where the authority signs only your own servers"
                    .into(),
            )
        }
        C::Expired | C::ExpiredContext { .. } => (
            "the server's certificate has expired".into(),
            "renew the certificate on the server and reload it; check this machine's clock too".into(),
        ),
        C::NotValidYet | C::NotValidYetContext { .. } => (
            "the server's certificate is not valid yet".into(),
            "check the clocks of this machine and the server".into(),
        ),
        other => (
            format!("the server's certificate cannot be used: {other}"),
            "it must be an X.509 version 3 certificate for servers, with the host in subjectAltName; \
             sslmode=require encrypts without looking at it"
                .into(),
        ),
    }
}

fn other_tls_reason(error: &rustls::Error) -> (String, String) {
    use rustls::AlertDescription as A;
    match error {
        rustls::Error::AlertReceived(
            A::CertificateRequired | A::BadCertificate | A::UnknownCA | A::CertificateUnknown,
        ) => (
            format!("the server does not accept our certificate: {error}"),
            "set database.sslcert and database.sslkey to a client certificate that the server's ssl_ca_file trusts"
                .into(),
        ),
        rustls::Error::PeerIncompatible(_) | rustls::Error::AlertReceived(A::ProtocolVersion | A::HandshakeFailure) => {
            (
                format!("the server and we share no TLS version or cipher: {error}"),
                "TLS 1.2 or later is needed; check ssl_min_protocol_version and ssl_ciphers on the server".into(),
            )
        }
        rustls::Error::InvalidMessage(_) => {
            ("the answer to the TLS handshake is not TLS".into(), "check that host and port are PostgreSQL's".into())
        }
        other => (format!("the TLS handshake failed: {other}"), "the server's log may have the reason".into()),
    }
}

fn network_reason(error: &io::Error, place: &Place<'_>) -> (String, String) {
    use io::ErrorKind as K;
    let text = error.to_string();
    let host = place.host;
    let (reason, hint): (&str, String) = match error.kind() {
        K::ConnectionRefused => (
            "connection refused",
            format!("nothing listens on {host}: check that the server runs, its listen_addresses, and host and port"),
        ),
        K::NotFound if host.is_socket() => (
            "there is no server socket",
            format!("{}/.s.PGSQL.{} does not exist: check host and port, or use a TCP address", host.host, host.port),
        ),
        K::PermissionDenied if host.is_socket() => {
            ("no permission for the server's socket", "run as a user who may enter the directory, or use TCP".into())
        }
        K::PermissionDenied if text.contains("read only") || text.contains("writes") => (
            if text.contains("writes") { "the server is read-only" } else { "the server allows writes" },
            "target_session_attrs asks for another kind of server; name the right host, or several".into(),
        ),
        K::TimedOut => {
            ("no answer in time", "check firewalls and security groups; see database.connect_timeout".into())
        }
        K::HostUnreachable | K::NetworkUnreachable => (
            "there is no route to the host",
            "the name may have an IPv6 address only, and this machine no IPv6 (Supabase's direct connection is such a \
             case: use its session pooler)"
                .into(),
        ),
        K::UnexpectedEof | K::ConnectionReset | K::BrokenPipe => ("the connection was closed", CLOSED_HINT.into()),
        _ if text.contains("lookup address") || text.contains("resolve") => {
            ("host not found", format!("the name {} does not resolve here: check its spelling and the DNS", host.host))
        }
        _ => (&text, "check host, port and network".into()),
    };
    (reason.to_owned(), hint)
}

/// The first cause of type `T`, also inside `io::Error`.
fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(e) = next {
        if let Some(found) = e.downcast_ref::<T>() {
            return Some(found);
        }
        let inner = e.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = inner.map(|i| i as &(dyn StdError + 'static)).or_else(|| e.source());
    }
    None
}

fn innermost(error: &tokio_postgres::Error) -> String {
    let mut last: &dyn StdError = error;
    while let Some(next) = last.source() {
        last = next;
    }
    last.to_string()
}
