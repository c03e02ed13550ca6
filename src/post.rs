//! Posts to an address that the operator named: http or https, with a connection of its own for each request.

use std::sync::Arc;

use futures_util::future::Either;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{HOST, HeaderMap, HeaderValue};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::error::{Error, Result};

/// An address that the operator named. It may hold a token, so errors do not repeat it.
#[derive(Clone)]
pub struct Receiver {
    key: &'static str,
    what: &'static str,
    uri: Uri,
    tls: Option<Arc<ClientConfig>>,
}

impl Receiver {
    /// `key` is the setting that names the address; `what` is what errors call who is there. Reads the certificates, so
    /// that what is wrong with them is told at the start.
    ///
    /// # Errors
    /// Input errors that name the key.
    pub fn new(key: &'static str, what: &'static str, url: &str) -> Result<Self> {
        let bad = || Error::input(format!("`{key}`: expected http://host[:port]/path or https://..., without a user"));
        let uri: Uri = url.parse().map_err(|_| bad())?;
        if uri.authority().is_none_or(|a| a.as_str().contains('@') || a.host().is_empty()) {
            return Err(bad());
        }
        let tls = match uri.scheme_str() {
            Some("http") => None,
            Some("https") => Some(Arc::new(tls(key)?)),
            _ => return Err(bad()),
        };
        Ok(Self { key, what, uri, tls })
    }

    /// Posts it once. There is no limit of time: the caller knows how long it may take.
    ///
    /// # Errors
    /// Nobody there, or nobody who speaks HTTP or has a certificate that we trust.
    pub async fn post(&self, headers: HeaderMap, body: Bytes) -> Result<StatusCode> {
        let what = self.what;
        let authority = self.uri.authority().ok_or_else(|| Error::internal("an address without a host"))?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let default = if self.tls.is_some() { 443 } else { 80 };
        let stream = TcpStream::connect((host.as_str(), authority.port_u16().unwrap_or(default)))
            .await
            .map_err(|e| Error::failed(format!("the {what} cannot be reached")).with_source(e))?;
        let wrong = |_| Error::internal("a request that cannot be written");
        let mut request = Request::post(self.uri.path_and_query().map_or("/", |p| p.as_str()))
            .body(Full::new(body))
            .map_err(wrong)?;
        *request.headers_mut() = headers;
        let named =
            HeaderValue::from_str(authority.as_str()).map_err(|_| Error::internal("a host that is no header"))?;
        request.headers_mut().insert(HOST, named);
        let answered = match &self.tls {
            None => send(stream, request).await,
            Some(tls) => {
                let name = ServerName::try_from(host)
                    .map_err(|_| Error::input(format!("`{}`: its host cannot be in a certificate", self.key)))?;
                let stream = tokio_rustls::TlsConnector::from(Arc::clone(tls))
                    .connect(name, stream)
                    .await
                    .map_err(|e| Error::failed(format!("no TLS with the {what}")).with_source(e))?;
                send(stream, request).await
            }
        };
        answered.map_err(|e| Error::failed(format!("the {what} does not speak HTTP")).with_source(e))
    }
}

async fn send(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> hyper::Result<StatusCode> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let response = std::pin::pin!(sender.send_request(request));
    // Where the other side closes the connection behind its answer, the answer is there all the same.
    let response = match futures_util::future::select(response, std::pin::pin!(connection)).await {
        Either::Left((response, _)) => response,
        Either::Right((_, response)) => response.await,
    };
    Ok(response?.status())
}

/// The certificates of the operating system (SSL_CERT_FILE and SSL_CERT_DIR are honoured).
fn tls(key: &str) -> Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if added == 0 {
        return Err(Error::input(format!("`{key}`: the operating system has no certificate authorities for https"))
            .with_hint("install ca-certificates, or name a PEM file in SSL_CERT_FILE"));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::internal("cannot set up TLS").with_source(e))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}
