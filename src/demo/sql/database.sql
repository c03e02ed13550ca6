-- Rights on the database itself. Not part of schema.sql, because CREATE DATABASE does not copy them from a template.
do $$
begin
  execute format('grant create, temporary on database %I to backfilld', current_database());
end
$$;
