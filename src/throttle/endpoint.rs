//! Asks an address of the operator's whether batches may run, as gh-ost and freno are asked.

use std::time::Duration;

use futures_util::future::Either;
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::header::HOST;
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::signal::Reading;
use crate::error::{Error, Result};
use crate::job::throttle::Endpoint;

/// Longest time for an answer, connecting included: it is asked with every measurement.
pub const TIMEOUT: Duration = Duration::from_secs(1);

/// Asks it. Only the status counts.
///
/// # Errors
/// Input if it cannot be reached or does not speak HTTP. The address is not repeated, it may hold a token.
pub async fn ask(endpoint: &Endpoint) -> Result<Reading> {
    let signal = format!("http_{}", endpoint.name);
    let status = match tokio::time::timeout(TIMEOUT, status(&endpoint.url)).await {
        Ok(status) => status,
        Err(_) => Err(Error::input(format!("no answer within {} s", TIMEOUT.as_secs()))),
    };
    match status.map_err(|e| e.context(format!("throttle endpoint {}", endpoint.name)))? {
        ok if ok.is_success() => Ok(Reading::at_most(&signal, 0.0, 1.0, "")),
        other => Ok(Reading::no(&signal, format!("it answers {}", other.as_u16()))),
    }
}

async fn status(url: &str) -> Result<StatusCode> {
    let bad = || Error::input("the address cannot be read");
    let uri: Uri = url.parse().map_err(|_| bad())?;
    let authority = uri.authority().ok_or_else(bad)?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(80)))
        .await
        .map_err(|e| Error::input("cannot connect").with_source(e))?;
    let http = |e: hyper::Error| Error::input("no HTTP").with_source(e);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    let request = Request::get(uri.path_and_query().map_or("/", |p| p.as_str()))
        .header(HOST, authority.as_str())
        .body(Empty::<Bytes>::new())
        .map_err(|_| bad())?;
    let response = std::pin::pin!(sender.send_request(request));
    // The connection ends with this future; nothing is left behind when it is dropped. Where the other side closes it
    // behind the answer, the answer is there all the same.
    let response = match futures_util::future::select(response, std::pin::pin!(connection)).await {
        Either::Left((response, _)) => response,
        Either::Right((_, response)) => response.await,
    };
    Ok(response.map_err(http)?.status())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    /// Answers one request with these bytes, and gives what was asked.
    async fn answered(with: &'static [u8]) -> (Result<Reading>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = vec![0; 1024];
            let n = stream.read(&mut buffer).await.unwrap();
            stream.write_all(with).await.unwrap();
            String::from_utf8_lossy(&buffer[..n]).into_owned()
        };
        let endpoint = Endpoint { name: "gate".into(), url: format!("http://{address}/check/x?y=1") };
        tokio::join!(ask(&endpoint), server)
    }

    #[tokio::test]
    async fn a_2xx_is_go_and_anything_else_is_wait() {
        let (reading, asked) = answered(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        assert!(!reading.unwrap().refuses);
        assert!(asked.starts_with("GET /check/x?y=1 HTTP/1.1\r\n") && asked.contains("host: 127.0.0.1:"), "{asked}");
        let (reading, _) = answered(b"HTTP/1.1 204 No Content\r\n\r\n").await;
        assert!(!reading.unwrap().refuses);
        for answer in [&b"HTTP/1.1 429 Too Many\r\ncontent-length: 3\r\n\r\nlag"[..], b"HTTP/1.1 302 Found\r\n\r\n"] {
            let (reading, _) = answered(answer).await;
            let reading = reading.unwrap();
            assert!(reading.refuses && reading.text().starts_with("http_gate: it answers "), "{reading:?}");
        }
    }

    #[tokio::test]
    async fn what_cannot_be_asked_is_an_error_without_the_address() {
        for answer in [&b"SSH-2.0-OpenSSH_9\r\n"[..], b""] {
            let (reading, _) = answered(answer).await;
            let error = reading.unwrap_err();
            assert!(error.line().contains("throttle endpoint gate"), "{}", error.line());
        }
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let endpoint = Endpoint { name: "gate".into(), url: format!("http://{free}/?token=secret") };
        let error = ask(&endpoint).await.unwrap_err();
        assert!(error.line().contains("cannot connect") && !error.line().contains("secret"), "{}", error.line());
    }
}
