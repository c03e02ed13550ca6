//! TLS as libpq means it, with rustls. The crypto provider is set per configuration, never for the process.
//!
//! rustls is stricter than OpenSSL in two ways that hit the certificates the PostgreSQL manual tells people to make; both
//! are allowed here as libpq does: a certificate that is itself in the root file is trusted, and a certificate without
//! subject alternative names may name its host in the common name.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme, version};
use tokio_postgres_rustls::MakeRustlsConnect;
use x509_cert::der::Decode as _;

use crate::error::{Error, Result};
use crate::pem::{certificates, private_key};
use crate::settings::{Roots, SslMode, TlsSpec};

/// Protocol name of PostgreSQL in TLS, needed when TLS begins without asking first (PostgreSQL 17).
const ALPN: &[u8] = b"postgresql";
/// Object identifiers, RFC 5280: common name and subject alternative name.
const COMMON_NAME: &str = "2.5.4.3";
const SUBJECT_ALT_NAME: &str = "2.5.29.17";

/// The TLS side of all connections to one target. Reads the certificate files now, so that a missing one is an error at
/// start and not at the first reconnection.
pub(super) fn connector(spec: &TlsSpec) -> Result<MakeRustlsConnect> {
    let provider = Arc::new(ring::default_provider());
    let versions: &[_] = if spec.only_tls13 { &[&version::TLS13] } else { &[&version::TLS13, &version::TLS12] };
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(versions)
        .map_err(|e| Error::internal("cannot set up TLS").with_source(e))?
        .dangerous()
        .with_custom_certificate_verifier(verifier(spec, &provider)?);
    let mut config = match &spec.client {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => builder
            .with_client_auth_cert(certificates("database.sslcert", cert)?, private_key("database.sslkey", key)?)
            .map_err(|e| {
                Error::input(format!("`database.sslkey`: {} does not belong to {}", key.display(), cert.display()))
                    .with_source(e)
            })?,
    };
    if spec.direct {
        config.alpn_protocols = vec![ALPN.to_vec()];
    }
    Ok(MakeRustlsConnect::new(config))
}

fn verifier(spec: &TlsSpec, provider: &CryptoProvider) -> Result<Arc<dyn ServerCertVerifier>> {
    let algorithms = provider.signature_verification_algorithms;
    let check_name = match (spec.mode, &spec.roots) {
        (SslMode::Disable | SslMode::Allow | SslMode::Prefer, _) => return Ok(Arc::new(AcceptAny(algorithms))),
        (SslMode::Require, Roots::Unset | Roots::System) => return Ok(Arc::new(AcceptAny(algorithms))),
        (SslMode::Require | SslMode::VerifyCa, _) => false,
        (SslMode::VerifyFull, _) => true,
    };
    let trusted = match &spec.roots {
        Roots::File(path) => certificates("database.sslrootcert", path)?,
        Roots::System | Roots::Unset => system_certificates()?,
    };
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(trusted.iter().cloned());
    if added == 0 {
        return Err(Error::input("`database.sslrootcert`: no certificate in it can be used as a root"));
    }
    let pinned = if matches!(spec.roots, Roots::File(_)) { trusted } else { Vec::new() };
    Ok(Arc::new(Verify { roots, pinned, check_name, algorithms }))
}

fn system_certificates() -> Result<Vec<CertificateDer<'static>>> {
    let found = rustls_native_certs::load_native_certs();
    for e in &found.errors {
        tracing::warn!(error = %e, "a certificate of the operating system was left out");
    }
    if found.certs.is_empty() {
        return Err(Error::input("the operating system has no certificate authorities to trust").with_hint(
            "install them (package ca-certificates) or set database.sslrootcert to the server's authority",
        ));
    }
    Ok(found.certs)
}

/// Encryption without identity: what disable to require ask for.
struct AcceptAny(WebPkiSupportedAlgorithms);

/// A chain to a trusted authority, and perhaps the right host name.
struct Verify {
    roots: RootCertStore,
    /// Certificates of the root file, which are trusted as they are.
    pinned: Vec<CertificateDer<'static>>,
    check_name: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verify {
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let cert = ParsedCertificate::try_from(end_entity)?;
        if self.pinned.iter().any(|p| p.as_ref() == end_entity.as_ref()) {
            check_validity(end_entity, now)?;
        } else {
            let algorithms = self.algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&cert, &self.roots, intermediates, now, algorithms)?;
        }
        if !self.check_name {
            return Ok(());
        }
        match verify_server_name(&cert, name) {
            Err(_) if common_name_matches(end_entity, &name.to_str()) => Ok(()),
            result => result,
        }
    }
}

fn parse(cert: &CertificateDer<'_>) -> Result<x509_cert::Certificate, rustls::Error> {
    x509_cert::Certificate::from_der(cert).map_err(|_| CertificateError::BadEncoding.into())
}

fn check_validity(cert: &CertificateDer<'_>, now: UnixTime) -> Result<(), rustls::Error> {
    let validity = parse(cert)?.tbs_certificate.validity;
    let now = now.as_secs();
    if now > validity.not_after.to_unix_duration().as_secs() {
        return Err(CertificateError::Expired.into());
    }
    if now < validity.not_before.to_unix_duration().as_secs() {
        return Err(CertificateError::NotValidYet.into());
    }
    Ok(())
}

/// libpq's rule: the common name counts only where there are no subject alternative names; `*.` matches one label.
fn common_name_matches(cert: &CertificateDer<'_>, host: &str) -> bool {
    let Ok(cert) = parse(cert) else { return false };
    let tbs = cert.tbs_certificate;
    if tbs.extensions.iter().flatten().any(|e| e.extn_id.to_string() == SUBJECT_ALT_NAME) {
        return false;
    }
    tbs.subject.0.iter().flat_map(|rdn| rdn.0.iter()).filter(|a| a.oid.to_string() == COMMON_NAME).any(|a| {
        let name = String::from_utf8_lossy(a.value.value()).to_ascii_lowercase();
        let host = host.to_ascii_lowercase();
        match name.strip_prefix("*.") {
            Some(domain) => host.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == domain),
            None => name == host,
        }
    })
}

impl ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

impl ServerCertVerifier for Verify {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity, intermediates, name, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl fmt::Debug for AcceptAny {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AcceptAny")
    }
}

impl fmt::Debug for Verify {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Verify {{ roots: {}, check_name: {} }}", self.roots.len(), self.check_name)
    }
}
