//! Certificates and keys from PEM files, for connections and for HTTP. `setting` is the key that names the file.

use std::path::Path;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::error::{Error, Result};

/// Reads all certificates of a file, at least one.
pub fn certificates(setting: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let failed = |e| {
        Error::input(format!("`{setting}`: cannot read certificates from {}", path.display()))
            .with_source(e)
            .with_hint("expected a PEM file with at least one BEGIN CERTIFICATE block")
    };
    let found: Vec<_> = CertificateDer::pem_file_iter(path).and_then(|certs| certs.collect()).map_err(failed)?;
    if found.is_empty() {
        return Err(failed(rustls::pki_types::pem::Error::NoItemsFound));
    }
    Ok(found)
}

/// Reads a key, and like libpq refuses one that others can read; root's may be readable by its group.
pub fn private_key(setting: &str, path: &Path) -> Result<PrivateKeyDer<'static>> {
    use std::os::unix::fs::MetadataExt as _;
    let wrong = |what: &str| Error::input(format!("`{setting}`: {}: {what}", path.display()));
    let meta = std::fs::metadata(path).map_err(|e| wrong("cannot read").with_source(e))?;
    let forbidden = if meta.uid() == 0 { 0o037 } else { 0o077 };
    if meta.mode() & forbidden != 0 {
        return Err(wrong("the key is accessible to others")
            .with_hint(format!("chmod 0600 {}, or 0640 if root owns it", path.display())));
    }
    PrivateKeyDer::from_pem_file(path)
        .map_err(|e| wrong("expected an unencrypted private key in PEM format").with_source(e))
}
