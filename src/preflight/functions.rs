//! The functions that the flip replaces: they must be there, be replaceable, and be restorable.

use tokio_postgres::types::Type;

use super::check::{Check, Tally};
use super::probe::{Probe, text};
use super::signature::{self, Head};
use crate::error::Result;
use crate::job::spec::Function;
use crate::pg::ident::{QualifiedName, split_qualified};

/// A function as it is.
struct Found {
    kind: String,
    defaults: usize,
    returns_set: bool,
    result: String,
    result_oid: u32,
    /// Names and types of input parameters.
    inputs: Vec<(String, u32)>,
    language: String,
    extension: bool,
    shown: String,
}

/// `functions_before`.
///
/// # Errors
/// Whatever the server says.
pub async fn functions_before(p: &Probe<'_>) -> Result<Check> {
    let name = "functions_before";
    if p.spec.functions.is_empty() {
        return Ok(Check::skip(name, "the job replaces no function"));
    }
    let mut tally = Tally::default();
    let mut lines = Vec::new();
    for function in &p.spec.functions {
        match find(p, &function.signature).await {
            Ok(Some(found)) => {
                lines.push(found.shown.clone());
                compare(p, function, &found, &mut tally).await?;
            }
            Ok(None) => missing(p, function, &mut tally).await?,
            Err(e) if p.client.is_closed() => return Err(e),
            Err(e) => tally.fail(
                format!("functions: {:?} cannot be read: {e}", function.signature),
                "write schema.name(argument types), with the schema of types outside pg_catalog",
            ),
        }
        for statement in &function.statements {
            lint(function, statement, &mut tally);
        }
    }
    let n = p.spec.functions.len();
    Ok(tally
        .check(name, format!("{n} function(s) to replace, with the same parameters, so they can be put back"))
        .details(lines))
}

async fn find(p: &Probe<'_>, signature: &str) -> Result<Option<Found>> {
    let rows = p
        .rows(
            "select p.prokind::text, p.pronargdefaults::int4, p.proretset, coalesce(pg_get_function_result(p.oid), ''),
                    p.prorettype, coalesce(p.proargnames, '{}')::text[], coalesce(p.proargmodes, '{}')::text[],
                    p.proargtypes::oid[], l.lanname::text,
                    exists (select from pg_depend d where d.classid = 'pg_proc'::regclass and d.objid = p.oid
                              and d.deptype = 'e'),
                    format('%I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid))
             from pg_proc p join pg_language l on l.oid = p.prolang join pg_namespace n on n.oid = p.pronamespace
             where p.oid = to_regprocedure($1)",
            &[text(&signature)],
        )
        .await?;
    Ok(rows.first().map(|r| {
        let (names, modes): (Vec<String>, Vec<String>) = (r.get(5), r.get(6));
        let types: Vec<u32> = r.get(7);
        // Without modes every parameter is an input.
        let mut input_names = names
            .iter()
            .enumerate()
            .filter(|(i, _)| modes.get(*i).is_none_or(|m| matches!(m.as_str(), "i" | "b" | "v")));
        let inputs =
            types.into_iter().map(|t| (input_names.next().map_or(String::new(), |(_, n)| n.clone()), t)).collect();
        Found {
            kind: r.get(0),
            defaults: usize::try_from(r.get::<_, i32>(1)).unwrap_or(0),
            returns_set: r.get(2),
            result: r.get(3),
            result_oid: r.get(4),
            inputs,
            language: r.get(8),
            extension: r.get(9),
            shown: r.get(10),
        }
    }))
}

async fn missing(p: &Probe<'_>, function: &Function, tally: &mut Tally) -> Result<()> {
    let Some(name) = qualified(&function.signature) else {
        tally.fail(format!("functions: {:?} is no signature", function.signature), "write schema.name(argument types)");
        return Ok(());
    };
    let (schema, proname) = (name.schema.as_str(), name.name.as_str());
    let others = p
        .texts(
            "select format('%I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid))
             from pg_proc p join pg_namespace n on n.oid = p.pronamespace where n.nspname = $1 and p.proname = $2 order by 1",
            &[text(&schema), text(&proname)],
        )
        .await?;
    let hint = match others.as_slice() {
        [] => "there is no function of that name; correct the signature".to_owned(),
        _ => format!("there are: {}", others.join("; ")),
    };
    tally.fail(format!("there is no function {}", function.signature), hint);
    Ok(())
}

fn qualified(signature: &str) -> Option<QualifiedName> {
    signature.split_once('(')?.0.trim().parse().ok()
}

/// `create or replace` keeps names, types, defaults and result, in both directions: there and back.
async fn compare(p: &Probe<'_>, function: &Function, found: &Found, tally: &mut Tally) -> Result<()> {
    let signature = &function.signature;
    if !matches!(found.kind.as_str(), "f" | "p") {
        tally.fail(
            format!("{signature} is an aggregate or window function"),
            "only functions and procedures can be replaced",
        );
        return Ok(());
    }
    if found.extension {
        tally.fail(format!("{signature} belongs to an extension"), "wrap it in a function of your own");
    }
    if matches!(found.language.as_str(), "c" | "internal") {
        tally.fail(format!("{signature} is written in {}", found.language), "only a superuser could put it back");
    }
    let wanted = qualified(signature);
    let heads: Vec<Head> = function.statements.iter().filter_map(|s| signature::head(s)).collect();
    let is_it = |h: &&Head| {
        wanted.as_ref().is_some_and(|w| h.name == w.name.as_str() && h.schema.as_deref() == Some(w.schema.as_str()))
    };
    for other in heads.iter().filter(|h| !is_it(h)) {
        tally.fail(
            format!(
                "{} also makes {}{}",
                function.file,
                other.schema.as_ref().map_or(String::new(), |s| format!("{s}.")),
                other.name
            ),
            "give each function its own entry, with its schema: only those are put back by rollback",
        );
    }
    let Some(head) = heads.iter().find(is_it) else {
        tally.fail(
            format!("{} does not make {signature}", function.file),
            "create or replace the function that the entry names",
        );
        return Ok(());
    };
    parameters(p, function, found, head, tally).await
}

async fn parameters(p: &Probe<'_>, function: &Function, found: &Found, head: &Head, tally: &mut Tally) -> Result<()> {
    let (signature, file) = (&function.signature, &function.file);
    let written: Vec<&str> = head.inputs().map(|i| i.sql_type.as_str()).chain([head.returns.as_str()]).collect();
    // To types; an unknown one is NULL.
    let row = p
        .one(
            "select array(select coalesce(to_regtype(x)::oid, 0) from unnest($1) with ordinality as u(x, n) order by n)",
            &[(&written, Type::TEXT_ARRAY)],
        )
        .await?;
    let mut types: Vec<u32> = row.get(0);
    let result = types.pop().unwrap_or(0);
    for (i, (input, oid)) in head.inputs().zip(&types).enumerate() {
        if *oid == 0 {
            tally.fail(
                format!("{file}: unknown type {:?}", input.sql_type),
                "the flip runs with search_path = pg_catalog: write the schema of every other type",
            );
        }
        if let Some((name, _)) = found.inputs.get(i)
            && *name != input.name
        {
            tally.fail(
                format!("{signature}: parameter {} is named {name:?}, in {file} {:?}", i + 1, input.name),
                "create or replace cannot rename parameters (42P13): keep the names",
            );
        }
    }
    let have: Vec<u32> = found.inputs.iter().map(|i| i.1).collect();
    if types != have && !types.contains(&0) {
        tally.fail(
            format!("{file} makes another overload than {signature}"),
            "the old function would stay beside the new one: keep the parameter types",
        );
        return Ok(());
    }
    let defaults = head.parameters.iter().filter(|x| x.has_default).count();
    if defaults != found.defaults {
        tally.fail(
            format!("{signature} has {} defaults, in {file} {defaults}", found.defaults),
            "create or replace cannot take defaults away (42P13), neither at the flip nor at rollback: keep them",
        );
    }
    let same_result = match head.returns.as_str() {
        "" => true,
        "table" => found.result.starts_with("TABLE"),
        _ => result == found.result_oid && head.returns_set == found.returns_set,
    };
    if !same_result {
        tally.fail(
            format!("{signature} returns {}, in {file} {}", found.result, head.returns),
            "create or replace cannot change the result type (42P13): keep it",
        );
    }
    Ok(())
}

/// A SECURITY DEFINER function without a fixed search_path runs what its caller puts in front (hazard 46).
fn lint(function: &Function, statement: &str, tally: &mut Tally) {
    let Some(head) = signature::head(statement) else { return };
    if !head.security_definer {
        return;
    }
    let last = head.search_path.as_deref().and_then(|path| path.rsplit(',').next().map(str::to_owned));
    let last =
        last.map(|l| split_qualified(l.trim_matches('\'')).ok().and_then(|v| v.first().map(|i| i.as_str().to_owned())));
    match last {
        None => tally.warn(
            format!("{}: security definer without set search_path", function.file),
            "its caller chooses what unqualified names mean: set search_path = pg_catalog, pg_temp and qualify names",
        ),
        Some(Some(l)) if l == "pg_temp" => {}
        // An empty path looks into pg_temp first for tables, too, but nothing unqualified resolves elsewhere.
        Some(None) => {}
        Some(Some(_)) => tally.warn(
            format!("{}: the search_path of a security definer function does not end in pg_temp", function.file),
            "pg_temp is searched first unless it is named: put it last",
        ),
    }
}
