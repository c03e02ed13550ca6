//! A small copy of a Supabase application: roles, schema, data. `schema.sql` is also the tests' template.

use tokio_postgres::Client;

use crate::demo::cluster::SUPERUSER;
use crate::error::Result;

/// Cluster-wide roles; harmless to run again.
pub const ROLES_SQL: &str = include_str!("sql/roles.sql");
/// Rights on the database that one is connected to.
pub const DATABASE_SQL: &str = include_str!("sql/database.sql");
/// The application's schema, in an empty database.
pub const SCHEMA_SQL: &str = include_str!("sql/schema.sql");
/// Rows; reads the settings `demo.rows` and `demo.seed`.
pub const DATA_SQL: &str = include_str!("sql/data.sql");
/// What the rows were before anything ran.
pub const BASELINE_SQL: &str = include_str!("sql/baseline.sql");

/// Login of the API server; becomes `anon`, `authenticated` or `service_role` for each request.
pub const AUTHENTICATOR: &str = "authenticator";
/// Login of the sign-in service, which owns `auth.users`.
pub const AUTH_ADMIN: &str = "supabase_auth_admin";
/// Owner of the application's tables.
pub const APP_OWNER: &str = "app_owner";
/// The daemon's own login.
pub const DAEMON: &str = "backfilld";

/// Every role that can log in, the superuser first.
pub const LOGINS: [&str; 5] = [SUPERUSER, AUTHENTICATOR, AUTH_ADMIN, APP_OWNER, DAEMON];

/// Whether [`DAEMON`] is a login that only the daemon uses. Before version 15 it has to be a superuser, which is never that:
/// others who are could become it. `server_version` is as [`crate::demo::cluster::server_version`] gives it.
pub fn login_is_dedicated(server_version: &str) -> bool {
    server_version.split('.').next().and_then(|major| major.parse().ok()).is_some_and(|major: u32| major >= 15)
}

/// Creates the roles where they are missing, and gives every login role `password`.
///
/// `client` is a superuser. The password is letters and digits, as [`crate::demo::cluster::Cluster::password`] is.
///
/// # Errors
/// What the server says.
pub async fn create_roles(client: &Client, password: &str) -> Result<()> {
    let mut sql = ROLES_SQL.to_owned();
    for login in LOGINS {
        sql.push_str(&format!("alter role {login} password {};\n", crate::pg::ident::literal(password)));
    }
    client.batch_execute(&sql).await.map_err(|e| crate::Error::from(e).context("sample roles"))
}

/// Grants the daemon what it needs on the database that `client`, a superuser, is connected to.
///
/// # Errors
/// What the server says.
pub async fn grant_on_database(client: &Client) -> Result<()> {
    client.batch_execute(DATABASE_SQL).await.map_err(|e| crate::Error::from(e).context("rights on the database"))
}

/// Creates the schema in the empty database that `client`, a superuser, is connected to.
///
/// # Errors
/// What the server says.
pub async fn create_schema(client: &Client) -> Result<()> {
    client.batch_execute(SCHEMA_SQL).await.map_err(|e| crate::Error::from(e).context("sample schema"))
}

/// Fills the schema with `rows` messages and what belongs to them, then VACUUM ANALYZE. The same for the same `seed`.
///
/// # Errors
/// What the server says.
pub async fn generate(client: &Client, rows: u64, seed: u32) -> Result<()> {
    let context = |e: tokio_postgres::Error| crate::Error::from(e).context("sample data");
    // One message, so one implicit transaction.
    let sql = format!("set local demo.rows = '{rows}'; set local demo.seed = '{seed}';\n{DATA_SQL}");
    client.batch_execute(&sql).await.map_err(context)?;
    for table in ["auth.users", "public.users", "public.conversations", "public.messages"] {
        client.batch_execute(&format!("vacuum (analyze) {table}")).await.map_err(context)?;
    }
    Ok(())
}

/// Keeps a fingerprint of every message for [`crate::demo::traffic::TrafficReport::check_oracle`].
///
/// # Errors
/// What the server says.
pub async fn take_baseline(client: &Client) -> Result<()> {
    client.batch_execute(BASELINE_SQL).await.map_err(|e| crate::Error::from(e).context("baseline"))
}
