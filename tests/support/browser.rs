//! A headless Chromium, driven by WebDriver over plain HTTP.

use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::wait_until;

/// A port that nobody uses now.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port()
}

/// A browser with one window, ended when dropped.
pub struct Browser {
    driver: Child,
    port: u16,
    session: String,
    _profile: tempfile::TempDir,
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Chromium leaves when its driver is asked to; a killed driver would leave it behind.
        let path = format!("/session/{}", self.session);
        let request = format!("DELETE {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        if let Ok(mut stream) = std::net::TcpStream::connect(("127.0.0.1", self.port)) {
            let _ = std::io::Write::write_all(&mut stream, request.as_bytes());
            let _ = std::io::Read::read(&mut stream, &mut [0; 64]);
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

impl Browser {
    pub async fn start() -> Self {
        let (port, profile) = (free_port(), tempfile::tempdir().expect("a directory"));
        let driver = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromedriver runs; scripts/ensure.sh installs it");
        let mut browser = Self { driver, port, session: String::new(), _profile: profile };
        wait_until("chromedriver listens", async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok())
            .await;
        let directory = format!("--user-data-dir={}", browser._profile.path().display());
        let args = json!([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1200,1000",
            directory
        ]);
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": {"args": args}, "goog:loggingPrefs": {"browser": "ALL"}}}});
        let answer = browser.post("/session", wanted).await;
        browser.session = answer["sessionId"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned();
        browser
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await.expect("chromedriver listens");
        let body = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).await.expect("it reads");
        // It keeps the connection, whatever it is asked for.
        let mut answer = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&answer);
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length =
                    head.lines().find_map(|l| l.to_lowercase().strip_prefix("content-length:").map(str::to_owned));
                let length: usize = length.and_then(|l| l.trim().parse().ok()).expect("a length");
                if body.len() >= length {
                    let answer: Value = serde_json::from_str(body).expect("JSON");
                    return answer["value"].clone();
                }
            }
            let n = stream.read_buf(&mut answer).await.expect("it answers");
            assert!(n > 0, "chromedriver closed the connection");
        }
    }

    async fn command(&self, command: &str, body: Value) -> Value {
        self.post(&format!("/session/{}/{command}", self.session), body).await
    }

    pub async fn open(&self, url: &str) {
        self.command("url", json!({ "url": url })).await;
    }

    /// What a script gives.
    pub async fn eval(&self, expression: &str) -> Value {
        self.command("execute/sync", json!({ "script": format!("return {expression};"), "args": [] })).await
    }

    /// The text of an element.
    pub async fn text(&self, id: &str) -> String {
        let found = self.eval(&format!("document.getElementById({id:?}).innerText")).await;
        found.as_str().unwrap_or_default().to_owned()
    }

    /// A command of the developer tools.
    pub async fn tools(&self, command: &str, parameters: Value) {
        self.command("goog/cdp/execute", json!({ "cmd": command, "params": parameters })).await;
    }

    /// What the console said since this was last asked, but for what level `INFO` and below say.
    pub async fn complaints(&self) -> Vec<String> {
        let log = self.command("se/log", json!({ "type": "browser" })).await;
        let log = log.as_array().unwrap_or_else(|| panic!("{log}"));
        let said = log.iter().filter(|e| matches!(e["level"].as_str(), Some("WARNING" | "SEVERE")));
        said.map(|e| e["message"].to_string()).collect()
    }
}
