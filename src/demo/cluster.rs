//! A throwaway PostgreSQL server: found, initialised, started, stopped, deleted. Blocking; plain processes.
//!
//! It listens on 127.0.0.1 only and wants a password, so that nobody else on the machine becomes superuser of a server
//! that runs under our account. As root, where the server refuses to run, it runs as `postgres`, else as `nobody`.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Environment variable naming the directory with the server's programs.
pub const BIN_ENV: &str = "BACKFILLD_PG_BIN";

/// The superuser that `initdb` creates.
pub const SUPERUSER: &str = "postgres";

/// What we run; a directory without all of them is not a server installation.
const PROGRAMS: [&str; 3] = ["postgres", "initdb", "pg_ctl"];

/// `initdb` takes 1-3 s, a start under 1 s; a minute is for a machine that is busy with other things.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// A free port can be taken between our look and the server's bind; three in a row is not bad luck any more.
const START_ATTEMPTS: u32 = 3;

/// How to make a [`Cluster`]. `Default` is a server in a temporary directory on a random port.
#[derive(Debug, Clone, Default)]
pub struct ClusterOptions {
    /// Directory with `postgres`, `initdb`, `pg_ctl`. Default: see [`find_binaries`].
    pub bin: Option<PathBuf>,
    /// Where the cluster lives; must not exist yet. Default: a new directory under the temporary directory.
    pub dir: Option<PathBuf>,
    /// TCP port on 127.0.0.1. Default: a free one.
    pub port: Option<u16>,
    /// Lines for `postgresql.conf`.
    pub settings: Vec<String>,
}

/// What is needed to find a running cluster again, in `cluster.json` beside the data directory.
#[derive(Serialize, Deserialize)]
struct State {
    bin: PathBuf,
    port: u16,
    password: String,
}

/// The account the server runs under, when it cannot be ours.
#[derive(Debug, Clone, Copy)]
struct ServerUser {
    uid: u32,
    gid: u32,
}

/// A running server. Dropping it stops the server and deletes its directory, unless [`Cluster::keep`] was called.
pub struct Cluster {
    dir: PathBuf,
    state: State,
    user: Option<ServerUser>,
    keep: bool,
}

impl Cluster {
    /// Initialises and starts a new server, and waits until it accepts connections.
    ///
    /// # Errors
    /// No server programs, a directory that exists, or a server that does not start: with the end of its log.
    pub fn start(options: &ClusterOptions) -> Result<Self> {
        let bin = find_binaries(options.bin.as_deref())?;
        let dir = match &options.dir {
            Some(dir) => dir.clone(),
            None => temp_root().join(format!("backfilld-{}", &random_word()[..8])),
        };
        make_private_dir(&dir)?;
        // From here on a failure deletes what we made.
        let user = match server_user(&dir) {
            Ok(user) => user,
            Err(error) => {
                let _ = fs::remove_dir_all(&dir);
                return Err(error);
            }
        };
        let mut cluster = Self { dir, state: State { bin, port: 0, password: random_word() }, user, keep: false };
        cluster.init(&options.settings)?;
        cluster.launch(options.port)?;
        Ok(cluster)
    }

    /// The server that [`Cluster::start`] left running in `dir`, if it is still alive. It is kept when dropped.
    pub fn adopt(dir: &Path) -> Option<Self> {
        let state: State = serde_json::from_slice(&fs::read(dir.join("cluster.json")).ok()?).ok()?;
        // Our own uid and the server's can differ; the owner of the data directory is the one who may ask pg_ctl.
        let user = server_user(dir).ok()?;
        let cluster = Self { dir: dir.to_owned(), state, user, keep: true };
        cluster.is_alive().then_some(cluster)
    }

    /// Leaves the server running, and its directory in place, when this value is dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// A connection URL with password. Every login role made by [`crate::demo::sample`] has the superuser's password.
    pub fn url(&self, user: &str, database: &str) -> String {
        format!("postgresql://{user}:{}@127.0.0.1:{}/{database}", self.state.password, self.state.port)
    }

    /// The TCP port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.state.port
    }

    /// The password of the superuser and of the sample's login roles: letters and digits only.
    pub fn password(&self) -> &str {
        &self.state.password
    }

    /// The directory that holds data, log and `cluster.json`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory of the server's programs.
    pub fn bin(&self) -> &Path {
        &self.state.bin
    }

    /// Whether the server's process runs and its port answers.
    pub fn is_alive(&self) -> bool {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.state.port));
        self.pg_ctl(&["status"]).is_ok() && TcpStream::connect_timeout(&address, Duration::from_secs(5)).is_ok()
    }

    /// Stops the server (fast: sessions are ended, data is written) and deletes its directory.
    ///
    /// # Errors
    /// The server did not stop within a minute, or the directory could not be deleted.
    pub fn stop(mut self) -> Result<()> {
        self.keep = true;
        self.pg_ctl(&["stop", "-m", "fast", "-w", "-t", "60"])?;
        fs::remove_dir_all(&self.dir)
            .map_err(|e| Error::internal(format!("cannot delete {}", self.dir.display())).with_source(e))
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    fn init(&self, settings: &[String]) -> Result<()> {
        let pwfile = self.dir.join("password");
        write_private(&pwfile, self.state.password.as_bytes())?;
        self.hand_over(&pwfile)?;
        self.hand_over(&self.dir)?;
        let mut initdb = self.program("initdb");
        initdb.arg("-D").arg(self.data()).args(["-U", SUPERUSER, "--auth=scram-sha-256", "--encoding=UTF8"]);
        // The C locale exists everywhere and sorts the same everywhere.
        initdb.args(["--locale=C", "--no-sync", "--pwfile"]).arg(&pwfile);
        self.run(initdb, "initdb")?;
        let _ = fs::remove_file(&pwfile);

        let path = self.data().join("postgresql.conf");
        let mut conf = fs::read_to_string(&path).map_err(|e| cannot("read", &path, e))?;
        conf.push_str("listen_addresses = '127.0.0.1'\nunix_socket_directories = ''\n");
        for line in settings {
            conf.push_str(line);
            conf.push('\n');
        }
        fs::write(&path, conf).map_err(|e| cannot("write", &path, e))
    }

    fn launch(&mut self, port: Option<u16>) -> Result<()> {
        let mut attempt = 1;
        loop {
            self.state.port = match port {
                Some(port) => port,
                None => free_port()?,
            };
            let options = format!("-p {}", self.state.port);
            let log = self.dir.join("server.log");
            let mut pg_ctl = self.program("pg_ctl");
            pg_ctl.arg("start").arg("-D").arg(self.data()).arg("-l").arg(&log);
            pg_ctl.args(["-w", "-t", "60", "-o", &options]);
            let Err(error) = self.run(pg_ctl, "pg_ctl start") else { break };
            let tail = tail_of(&log);
            if port.is_some() || attempt == START_ATTEMPTS || !tail.contains("could not bind") {
                return Err(error.with_hint(format!("the server's log ends with:\n{tail}")));
            }
            attempt += 1;
        }
        let state =
            serde_json::to_vec(&self.state).map_err(|e| Error::internal("cannot write state").with_source(e))?;
        write_private(&self.dir.join("cluster.json"), &state)
    }

    fn pg_ctl(&self, args: &[&str]) -> Result<()> {
        let mut command = self.program("pg_ctl");
        command.args(args).arg("-D").arg(self.data());
        self.run(command, &format!("pg_ctl {}", args.first().unwrap_or(&"")))
    }

    /// A program of the server, under the server's account, without the PG* variables of whoever started us.
    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.state.bin.join(name));
        command.current_dir(&self.dir).env("LC_ALL", "C").stdin(Stdio::null());
        for (key, _) in std::env::vars_os() {
            if key.to_string_lossy().starts_with("PG") {
                command.env_remove(key);
            }
        }
        if let Some(user) = self.user {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    /// Runs to the end within [`COMMAND_TIMEOUT`]; what the program printed is in the error.
    fn run(&self, mut command: Command, what: &str) -> Result<()> {
        let path = self.dir.join("commands.log");
        let open = || fs::OpenOptions::new().create(true).append(true).open(&path);
        let out = open().map_err(|e| cannot("write", &path, e))?;
        let err = open().map_err(|e| cannot("write", &path, e))?;
        let mut child = command.stdout(out).stderr(err).spawn().map_err(|e| {
            Error::internal(format!("cannot run {}", command.get_program().to_string_lossy()))
                .with_source(e)
                .with_hint("the server's account must be able to read and execute its programs")
        })?;
        let deadline = Instant::now() + COMMAND_TIMEOUT;
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => {
                    return Err(Error::internal(format!("{what} failed: {status}"))
                        .with_hint(format!("its output ends with:\n{}", tail_of(&path))));
                }
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                Ok(None) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(Error::internal(format!("{what} did not finish within {COMMAND_TIMEOUT:?}")));
                }
                Err(e) => return Err(Error::internal(format!("cannot wait for {what}")).with_source(e)),
            }
        }
    }

    /// Gives a path to the server's account.
    fn hand_over(&self, path: &Path) -> Result<()> {
        let Some(user) = self.user else { return Ok(()) };
        std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)).map_err(|e| cannot("chown", path, e))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.keep {
            // Nothing in here is worth a clean shutdown.
            let _ = self.pg_ctl(&["stop", "-m", "immediate", "-w", "-t", "60"]);
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// The directory with the server's programs: `explicit`, else `$BACKFILLD_PG_BIN`, else `PATH`, else the newest of
/// Debian's directories.
///
/// # Errors
/// None found, or the one asked for is incomplete: says what to install or set.
pub fn find_binaries(explicit: Option<&Path>) -> Result<PathBuf> {
    let asked = explicit.map(Path::to_owned).or_else(|| std::env::var_os(BIN_ENV).map(PathBuf::from));
    if let Some(dir) = asked {
        return match PROGRAMS.iter().find(|name| !dir.join(name).is_file()) {
            None => dir.canonicalize().map_err(|e| cannot("resolve", &dir, e)),
            Some(missing) => Err(Error::input(format!("no {missing} in {}", dir.display()))
                .with_hint("name the directory that holds postgres, initdb and pg_ctl")),
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).find_map(|dir| {
        // Symbolic links lead to the directory where the programs find each other.
        let real = dir.join("pg_ctl").canonicalize().ok()?;
        complete(real.parent()?)
    });
    in_path.or_else(newest_debian).ok_or_else(|| {
        Error::input("no PostgreSQL server found in PATH or /usr/lib/postgresql").with_hint(format!(
            "install one (Debian, Ubuntu: apt-get install postgresql; macOS: brew install postgresql)\n\
             or set {BIN_ENV} to the directory that holds postgres, initdb and pg_ctl"
        ))
    })
}

/// The version of the server in `bin`, such as `15.18`.
///
/// # Errors
/// The program does not run or prints something else.
pub fn server_version(bin: &Path) -> Result<String> {
    let program = bin.join("postgres");
    let output = Command::new(&program).arg("--version").output().map_err(|e| cannot("run", &program, e))?;
    // "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match text.split_whitespace().nth(2) {
        Some(version) => Ok(version.to_owned()),
        None => Err(Error::internal(format!("{} --version printed {text:?}", program.display()))),
    }
}

/// The temporary directory, or `/tmp` when the server's account could not get into it.
pub fn temp_root() -> PathBuf {
    let dir = std::env::temp_dir();
    if is_open_to_others(&dir) { dir } else { PathBuf::from("/tmp") }
}

/// Whether another account can walk down to `dir`: every directory on the way has the execute bit for others.
pub fn is_open_to_others(dir: &Path) -> bool {
    let Ok(dir) = dir.canonicalize() else { return false };
    dir.ancestors().all(|d| fs::metadata(d).is_ok_and(|m| m.permissions().mode() & 0o001 != 0))
}

fn complete(dir: &Path) -> Option<PathBuf> {
    PROGRAMS.iter().all(|name| dir.join(name).is_file()).then(|| dir.to_owned())
}

fn newest_debian() -> Option<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .ok()?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let version = entry.file_name().to_str()?.parse().ok()?;
            Some((version, complete(&entry.path().join("bin"))?))
        })
        .collect();
    found.sort();
    found.pop().map(|(_, dir)| dir)
}

/// The account to run programs as, for a cluster in `dir`; `None` is our own. A directory that root made is still to be
/// handed over; one that belongs to somebody else has been.
fn server_user(dir: &Path) -> Result<Option<ServerUser>> {
    let owner = fs::metadata(dir).map_err(|e| cannot("read", dir, e))?;
    if id("-u", None) != Some(0) {
        return Ok(None);
    }
    if owner.uid() != 0 {
        return Ok(Some(ServerUser { uid: owner.uid(), gid: owner.gid() }));
    }
    let user = ["postgres", "nobody"]
        .iter()
        .find_map(|name| Some(ServerUser { uid: id("-u", Some(name))?, gid: id("-g", Some(name))? }));
    match user {
        Some(user) => Ok(Some(user)),
        None => Err(Error::internal("PostgreSQL does not run as root, and there is no account postgres or nobody")
            .with_hint("run as an ordinary user, or create an account named postgres")),
    }
}

/// `id -u name`: knows accounts of every source, not only /etc/passwd.
fn id(flag: &str, name: Option<&str>) -> Option<u32> {
    let output = Command::new("id").arg(flag).args(name).stderr(Stdio::null()).output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

fn make_private_dir(dir: &Path) -> Result<()> {
    fs::DirBuilder::new().mode(0o700).create(dir).map_err(|e| cannot("create", dir, e))
}

fn write_private(path: &Path, content: &[u8]) -> Result<()> {
    let file = fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path);
    file.and_then(|mut f| std::io::Write::write_all(&mut f, content)).map_err(|e| cannot("write", path, e))
}

fn free_port() -> Result<u16> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(|e| Error::internal("cannot find a free port on 127.0.0.1").with_source(e))
}

fn random_word() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// The last lines of a log, at most 4 kB.
fn tail_of(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(mut file) = fs::File::open(path) {
        let length = file.metadata().map_or(0, |m| m.len());
        let _ = file.seek(SeekFrom::Start(length.saturating_sub(4096)));
        let _ = file.read_to_end(&mut bytes);
    }
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

fn cannot(verb: &str, path: impl AsRef<OsStr>, error: std::io::Error) -> Error {
    Error::internal(format!("cannot {verb} {}", path.as_ref().to_string_lossy())).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_without_server_programs_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let error = find_binaries(Some(dir.path())).unwrap_err();
        assert!(error.to_string().starts_with("no postgres in "), "{error}");
    }

    #[test]
    fn the_tail_of_a_log_is_its_last_fifteen_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let text: Vec<String> = (1..=40).map(|n| format!("line {n}")).collect();
        fs::write(&path, text.join("\n")).unwrap();
        let tail = tail_of(&path);
        assert!(tail.starts_with("line 26\n") && tail.ends_with("line 40"), "{tail}");
    }
}
