//! Posts one notification as JSON.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::Either;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rand::RngExt;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tracing::debug;

use super::Notification;
use crate::error::{Error, Result};
use crate::settings::HookSettings;

/// Attempts for one notification: with doubling pauses from one second that is half a minute.
const ATTEMPTS: u32 = 6;
/// Longest time for one attempt, connecting included.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A webhook that the settings name.
#[derive(Clone)]
pub struct Webhook {
    uri: Uri,
    secret: Option<HeaderValue>,
    tls: Option<Arc<ClientConfig>>,
}

impl Webhook {
    /// Reads secret and certificates, so that what is wrong with them is told at the start. `None`: there is no webhook.
    ///
    /// # Errors
    /// Input errors that name the key. The address is not repeated, it may hold a token.
    pub fn new(settings: &HookSettings) -> Result<Option<Self>> {
        let Some(url) = &settings.webhook else { return Ok(None) };
        let bad = || Error::input("`hooks.webhook`: expected http://host[:port]/path or https://..., without a user");
        let uri: Uri = url.expose_secret().parse().map_err(|_| bad())?;
        if uri.authority().is_none_or(|a| a.as_str().contains('@') || a.host().is_empty()) {
            return Err(bad());
        }
        let tls = match uri.scheme_str() {
            Some("http") => None,
            Some("https") => Some(Arc::new(tls()?)),
            _ => return Err(bad()),
        };
        let secret = match (&settings.webhook_secret, &settings.webhook_secret_file) {
            (Some(secret), _) => Some(secret.clone()),
            (None, Some(file)) => {
                let text = std::fs::read_to_string(file).map_err(|e| {
                    Error::input(format!("`hooks.webhook_secret_file`: cannot read {}", file.display())).with_source(e)
                })?;
                Some(SecretString::from(text.trim_end_matches(['\r', '\n']).to_owned()))
            }
            (None, None) => None,
        };
        let header = |s: SecretString| {
            let mut value = HeaderValue::from_str(&format!("Bearer {}", s.expose_secret())).map_err(|_| {
                Error::input("`hooks.webhook_secret`: expected printable ASCII, since it goes into a header")
            })?;
            value.set_sensitive(true);
            Ok::<_, Error>(value)
        };
        Ok(Some(Self { uri, secret: secret.map(header).transpose()?, tls }))
    }

    /// Posts it, and tries again for a while where that may help.
    ///
    /// # Errors
    /// The last attempt's.
    pub(super) async fn deliver(&self, what: &Notification) -> Result<()> {
        let body = serde_json::to_vec(what).map_err(|e| Error::internal("a notification as JSON").with_source(e))?;
        let body = Bytes::from(body);
        for attempt in 1.. {
            let answer = match tokio::time::timeout(TIMEOUT, self.post(body.clone())).await {
                Ok(answer) => answer,
                Err(_) => Err(Error::failed(format!("no answer within {} s", TIMEOUT.as_secs()))),
            };
            let e = match answer {
                Ok(status) if status.is_success() => return Ok(()),
                Ok(status) => {
                    let e = Error::failed(format!("the webhook answers {}", status.as_u16()));
                    let later = status.is_server_error()
                        || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT);
                    if !later {
                        return Err(e);
                    }
                    e
                }
                Err(e) => e,
            };
            if attempt >= ATTEMPTS {
                return Err(e);
            }
            debug!(attempt, "hook: trying again: {}", e.line());
            let wait = Duration::from_secs(1 << (attempt - 1)).mul_f64(rand::rng().random_range(0.5..1.0));
            tokio::time::sleep(wait).await;
        }
        Ok(())
    }

    async fn post(&self, body: Bytes) -> Result<StatusCode> {
        let authority = self.uri.authority().ok_or_else(|| Error::internal("an address without a host"))?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let default = if self.tls.is_some() { 443 } else { 80 };
        let stream = TcpStream::connect((host.as_str(), authority.port_u16().unwrap_or(default)))
            .await
            .map_err(|e| Error::failed("the webhook cannot be reached").with_source(e))?;
        let mut request = Request::post(self.uri.path_and_query().map_or("/", |p| p.as_str()))
            .header(HOST, authority.as_str())
            .header(CONTENT_TYPE, "application/json");
        if let Some(secret) = &self.secret {
            request = request.header(AUTHORIZATION, secret);
        }
        let request = request.body(Full::new(body)).map_err(|_| Error::internal("a request that cannot be written"))?;
        let Some(tls) = &self.tls else { return send(stream, request).await };
        let name = ServerName::try_from(host)
            .map_err(|_| Error::input("`hooks.webhook`: its host cannot be in a certificate"))?;
        let stream = tokio_rustls::TlsConnector::from(Arc::clone(tls))
            .connect(name, stream)
            .await
            .map_err(|e| Error::failed("no TLS with the webhook").with_source(e))?;
        send(stream, request).await
    }
}

async fn send(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Result<StatusCode> {
    let http = |e: hyper::Error| Error::failed("the webhook does not speak HTTP").with_source(e);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    let response = std::pin::pin!(sender.send_request(request));
    // Where the other side closes the connection behind its answer, the answer is there all the same.
    let response = match futures_util::future::select(response, std::pin::pin!(connection)).await {
        Either::Left((response, _)) => response,
        Either::Right((_, response)) => response.await,
    };
    Ok(response.map_err(http)?.status())
}

/// The certificates of the operating system (SSL_CERT_FILE and SSL_CERT_DIR are honoured).
fn tls() -> Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if added == 0 {
        return Err(Error::input("`hooks.webhook`: the operating system has no certificate authorities for https")
            .with_hint("install ca-certificates, or name a PEM file in SSL_CERT_FILE"));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::internal("cannot set up TLS").with_source(e))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}
