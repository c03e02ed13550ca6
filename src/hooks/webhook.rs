//! Posts one notification as JSON.

use std::time::Duration;

use hyper::StatusCode;
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use rand::RngExt;
use secrecy::{ExposeSecret as _, SecretString};
use tracing::debug;

use super::Notification;
use crate::error::{Error, Result};
use crate::post::Receiver;
use crate::settings::HookSettings;

/// Attempts for one notification: with doubling pauses from one second that is half a minute.
const ATTEMPTS: u32 = 6;
/// Longest time for one attempt, connecting included.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A webhook that the settings name.
#[derive(Clone)]
pub struct Webhook {
    receiver: Receiver,
    secret: Option<HeaderValue>,
}

impl Webhook {
    /// Reads secret and certificates, so that what is wrong with them is told at the start. `None`: there is no webhook.
    ///
    /// # Errors
    /// Input errors that name the key. The address is not repeated, it may hold a token.
    pub fn new(settings: &HookSettings) -> Result<Option<Self>> {
        let Some(url) = &settings.webhook else { return Ok(None) };
        let receiver = Receiver::new("hooks.webhook", "webhook", url.expose_secret())?;
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
        Ok(Some(Self { receiver, secret: secret.map(header).transpose()? }))
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
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(secret) = &self.secret {
            headers.insert(AUTHORIZATION, secret.clone());
        }
        self.receiver.post(headers, body).await
    }
}
