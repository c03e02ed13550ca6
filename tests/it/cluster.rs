//! The throwaway server.

use backfilld::demo::cluster::{Cluster, ClusterOptions, SUPERUSER};
use tokio_postgres::NoTls;

#[tokio::test]
async fn a_throwaway_server_can_be_adopted_and_leaves_nothing_behind() {
    let dir = tempfile::Builder::new().prefix("backfilld-").tempdir_in("/tmp").expect("a directory");
    let options = ClusterOptions {
        bin: std::env::var_os("BACKFILLD_TEST_PG_BIN").map(Into::into),
        dir: Some(dir.path().join("cluster")),
        settings: vec!["fsync = off".into(), "cluster_name = 'throwaway'".into()],
        ..ClusterOptions::default()
    };
    open(dir.path());
    let cluster = Cluster::start(&options).unwrap_or_else(|e| panic!("{}", e.render()));
    let (client, connection) = tokio_postgres::connect(&cluster.url(SUPERUSER, "postgres"), NoTls).await.expect("up");
    tokio::spawn(connection);
    let row = client
        .query_one(
            "select current_setting('cluster_name'), pg_encoding_to_char(encoding) from pg_database \
        where datname = 'postgres'",
            &[],
        )
        .await
        .expect("answers");
    assert_eq!((row.get::<_, &str>(0), row.get::<_, &str>(1)), ("throwaway", "UTF8"));

    let adopted = Cluster::adopt(cluster.dir()).expect("it runs");
    assert_eq!(adopted.url("x", "y"), cluster.url("x", "y"));
    drop(adopted);
    assert!(cluster.is_alive(), "an adopted server stays");

    let wrong = cluster.url(SUPERUSER, "postgres").replace(cluster.password(), "wrong");
    let error = tokio_postgres::connect(&wrong, NoTls).await.map(|_| ()).expect_err("the password is checked");
    assert_eq!(error.code().map(|c| c.code()), Some("28P01"));

    let path = cluster.dir().to_owned();
    cluster.stop().expect("it stops");
    assert!(!path.exists());
    assert!(Cluster::adopt(&path).is_none());
}

#[tokio::test]
async fn a_server_that_does_not_start_says_why() {
    let dir = tempfile::Builder::new().prefix("backfilld-").tempdir_in("/tmp").expect("a directory");
    open(dir.path());
    let path = dir.path().join("cluster");
    let options = ClusterOptions {
        bin: std::env::var_os("BACKFILLD_TEST_PG_BIN").map(Into::into),
        dir: Some(path.clone()),
        settings: vec!["shared_buffers = nonsense".into()],
        ..ClusterOptions::default()
    };
    let error = Cluster::start(&options).err().expect("the setting is wrong");
    assert!(error.hint().unwrap_or_default().contains("shared_buffers"), "{}", error.render());
    assert!(!path.exists(), "a failed start leaves nothing behind");
}

/// As root the server runs under another account, which has to get into the directory.
fn open(dir: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).expect("ours");
}
