-- The traffic's ledger is loaded into these.
create temporary table traffic_ledger (id uuid primary key, conversation_id uuid, expected text, content_sha256 text);
create temporary table traffic_moved (conversation_id uuid primary key);
create temporary table traffic_gone (conversation_id uuid primary key, certain boolean);
create temporary table traffic_broadcast (id uuid primary key);
