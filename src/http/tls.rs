//! HTTP over TLS, with the stack that the connections to the database have.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::Listener;
use rustls::ServerConfig;
use rustls::crypto::ring;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::error::{Error, Result};
use crate::pem;

/// A handshake takes milliseconds; who takes longer is no browser.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes under way at once. More wait in the system's queue, so that nobody can fill our memory with them.
const HANDSHAKES: usize = 64;

/// Certificate and key as files.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The chain, the server's certificate first, as PEM.
    pub cert: PathBuf,
    /// Its key, as PEM.
    pub key: PathBuf,
}

/// Reads both, and whether they belong together.
pub(super) fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor> {
    let certificates = pem::certificates("http.tls_cert", &files.cert)?;
    let key = pem::private_key("http.tls_key", &files.key)?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::internal("cannot set up TLS").with_source(e))?
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .map_err(|e| {
            let (key, cert) = (files.key.display(), files.cert.display());
            Error::input(format!("`http.tls_key`: {key} does not belong to {cert}")).with_source(e)
        })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Gives connections on which the handshake is over. A client that stalls keeps no other one waiting.
pub(super) struct TlsListener {
    tcp: TcpListener,
    acceptor: TlsAcceptor,
    shaking: JoinSet<Option<(TlsStream<TcpStream>, SocketAddr)>>,
}

impl TlsListener {
    pub(super) fn new(tcp: TcpListener, acceptor: TlsAcceptor) -> Self {
        Self { tcp, acceptor, shaking: JoinSet::new() }
    }
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            tokio::select! {
                (stream, peer) = Listener::accept(&mut self.tcp), if self.shaking.len() < HANDSHAKES => {
                    let handshake = self.acceptor.accept(stream);
                    self.shaking.spawn(async move {
                        match tokio::time::timeout(HANDSHAKE, handshake).await {
                            Ok(Ok(stream)) => Some((stream, peer)),
                            Ok(Err(e)) => {
                                tracing::debug!(%peer, error = %e, "no TLS");
                                None
                            }
                            Err(_) => None,
                        }
                    });
                }
                Some(shaken) = self.shaking.join_next() => {
                    if let Ok(Some(connection)) = shaken {
                        return connection;
                    }
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.tcp.local_addr()
    }
}
