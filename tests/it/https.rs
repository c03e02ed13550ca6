//! The status page over TLS, as others reach it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::{Cli, JobDir, Ledger, Template, TestDb, free_port, wait_until};

fn openssl(dir: &Path, args: &str) {
    let ran = Command::new("openssl").args(args.split(' ')).current_dir(dir).output().expect("openssl runs");
    assert!(ran.status.success(), "openssl {args}: {}", String::from_utf8_lossy(&ran.stderr));
}

/// An authority, a certificate of it for localhost, and one more authority and key that have nothing to do with it.
fn certificates() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    for name in ["ca", "other"] {
        openssl(dir.path(), &format!("req -x509 {key} -days 30 -subj /CN={name} -keyout {name}.key -out {name}.crt"));
    }
    fs::write(dir.path().join("ext"), "subjectAltName=DNS:localhost").expect("writable");
    openssl(dir.path(), &format!("req -new {key} -subj /CN=page -keyout page.key -out page.csr"));
    openssl(
        dir.path(),
        "x509 -req -in page.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -extfile ext -out page.crt",
    );
    dir
}

/// The answer to a request, by who trusts this authority.
async fn get(port: u16, authority: &Path, path: &str, token: &str) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority).expect("a certificate")).expect("an authority");
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = TcpStream::connect(("127.0.0.1", port)).await?;
    let name = ServerName::try_from("localhost").expect("a name");
    let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await?;
    let request =
        format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: Bearer {token}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[tokio::test]
async fn from_elsewhere_the_page_is_read_over_tls_with_the_token_and_by_who_trusts_the_authority() {
    let (db, job, dir) = (TestDb::new(Template::Rows(200)).await, JobDir::shipped(), certificates());
    let path = |name: &str| dir.path().join(name);
    let port = free_port();
    let daemon = Cli::new(&db)
        .env("BACKFILLD_HTTP__LISTEN", &format!("0.0.0.0:{port}"))
        .env("BACKFILLD_HTTP__TOKEN", "sesame")
        .env("BACKFILLD_HTTP__TLS_CERT", path("page.crt").to_str().expect("UTF-8"))
        .env("BACKFILLD_HTTP__TLS_KEY", path("page.key").to_str().expect("UTF-8"))
        .start(&["run", job.path()]);
    wait_until("it listens", async || TcpStream::connect(("127.0.0.1", port)).await.is_ok()).await;
    // Who connects and says nothing keeps nobody waiting.
    let mut silent = Vec::new();
    for _ in 0..5 {
        silent.push(TcpStream::connect(("127.0.0.1", port)).await.expect("it listens"));
    }
    for of in ["/", "/api/v1/status", "/metrics"] {
        let answer = get(port, &path("ca.crt"), of, "sesame").await.expect(of);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let answer = get(port, &path("ca.crt"), of, "sesam").await.expect(of);
        assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    }
    let refused = get(port, &path("other.crt"), "/", "sesame").await.expect_err("another authority");
    assert!(refused.to_string().contains("UnknownIssuer"), "{refused}");
    let mut plain = TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
    plain.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.expect("sent");
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!String::from_utf8_lossy(&answer).contains("HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    drop(silent);
    daemon.signal("TERM");
    daemon.ended().await.expect(0, "");
}

#[tokio::test]
async fn what_tls_cannot_be_had_with_is_one_error_at_the_start() {
    let (db, job, dir) = (TestDb::new(Template::Schema).await, JobDir::shipped(), certificates());
    fs::copy(dir.path().join("page.key"), dir.path().join("open.key")).expect("copied");
    fs::set_permissions(dir.path().join("open.key"), fs::Permissions::from_mode(0o644)).expect("ours");
    let cases = [
        ("page.crt", "gone.key", "`http.tls_key`"),
        ("gone.crt", "page.key", "`http.tls_cert`: cannot read certificates"),
        ("page.crt", "other.key", "`http.tls_key`"),
        ("page.crt", "page.crt", "`http.tls_key`"),
        ("page.crt", "open.key", "accessible to others"),
        ("page.crt", "", "`http.tls_key`: expected the key of `http.tls_cert`"),
        ("", "", "a token would cross the network unencrypted"),
    ];
    for (cert, key, says) in cases {
        let mut cli = Cli::new(&db).env("BACKFILLD_HTTP__LISTEN", "0.0.0.0:0").env("BACKFILLD_HTTP__TOKEN", "sesame");
        for (name, file) in [("BACKFILLD_HTTP__TLS_CERT", cert), ("BACKFILLD_HTTP__TLS_KEY", key)] {
            if !file.is_empty() {
                cli = cli.env(name, dir.path().join(file).to_str().expect("UTF-8"));
            }
        }
        let ended = cli.run(&["run", "--once", job.path()]).await;
        ended.expect(2, says);
        assert_eq!(ended.stderr.lines().filter(|l| l.starts_with("error: ")).count(), 1, "{ended:#?}");
    }
    assert!(Ledger::new(&db).await.is("select to_regnamespace('backfilld') is null").await);
}
