#!/bin/bash
# Run once by the PostgreSQL image in an empty data directory: the demo's roles, schema and 200,000 messages in POSTGRES_DB,
# and the daemon's password from its secret.
set -euo pipefail
sql=${SAMPLE_SQL:-/sample}
psql -X -q -v ON_ERROR_STOP=1 -U "${POSTGRES_USER:-postgres}" -d "${POSTGRES_DB:-app}" \
  -f "$sql/roles.sql" -f "$sql/database.sql" -f "$sql/schema.sql"
# In one transaction, as the demo does it.
psql -X -q -1 -v ON_ERROR_STOP=1 -U "${POSTGRES_USER:-postgres}" -d "${POSTGRES_DB:-app}" -o /dev/null \
  -c "set demo.rows = ${SAMPLE_ROWS:-200000}" -c "set demo.seed = 1" -f "$sql/data.sql"
# By standard input: arguments can be read by others.
psql -X -q -v ON_ERROR_STOP=1 -U "${POSTGRES_USER:-postgres}" -d "${POSTGRES_DB:-app}" <<SQL
\\set password \`cat "${PASSWORD_FILE:-/run/secrets/backfilld_password}"\`
alter role backfilld password :'password';
SQL
