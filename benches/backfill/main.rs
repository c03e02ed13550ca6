//! `make bench`: the daemon against a bare loop and one UPDATE, and what it costs, on a throwaway server with the demo's
//! table. docs/benchmarks.md says how to read the numbers.

mod chart;
mod fill;
mod flip;
mod foreground;
mod interrupt;
mod pace;
mod reads;
mod report;
mod resources;
mod verify;
mod world;

use std::process::ExitCode;

use backfilld::Result;
use clap::Parser;

use report::Report;
use world::World;

/// Benchmarks of backfilld on a throwaway server.
#[derive(Parser)]
#[command(bin_name = "make bench BENCH_FLAGS=")]
struct Args {
    /// Rows of the table, 20000 or more
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(u64).range(20_000..))]
    rows: u64,
    /// Repetitions; medians are shown
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Repetitions of the flip
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    flips: u32,
    /// The server's max_wal_size: small enough, checkpoints come while rows are filled, as they do on large tables
    #[arg(long, default_value = "8GB")]
    max_wal_size: String,
    /// The server's shared_buffers: a table that fits is filled faster than one that does not
    #[arg(long, default_value = "512MB")]
    shared_buffers: String,
    /// The ways to fill; default: all
    #[arg(long, value_delimiter = ',', value_enum)]
    ways: Vec<fill::Way>,
    /// A bigint key, in the order of the heap, instead of uuid v4
    #[arg(long)]
    bigint: bool,
    /// Another kind of table than the demo's
    #[arg(long, value_enum)]
    shape: Option<world::Shape>,
    /// While the column is filled, so many transactions per second by pgbench
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    foreground: Option<u32>,
    /// With --only pace: the whole curve, not just the default beside nothing
    #[arg(long)]
    curve: bool,
    /// Only these sections
    #[arg(long, value_delimiter = ',', value_enum)]
    only: Vec<Section>,
    /// Cargo says so
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Section {
    /// Rows per second, WAL and growth
    Fill,
    /// Memory and CPU of the daemon
    Resources,
    /// Time to stop, and to be back at work after kill -9
    Interrupt,
    /// How long the flip holds ACCESS EXCLUSIVE
    Flip,
    /// Speed of the verification
    Verify,
    /// The application's latency against the rate; only by name
    Pace,
    /// The application's throughput, as much as the server has, and the rate beside it; only by name
    Saturated,
    /// The application's reads before and after the flip; only by name
    Reads,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let result = match runtime {
        // The world is dropped in either case, and its server with it.
        Ok(runtime) => runtime.block_on(async {
            tokio::select! {
                result = run(&args) => result,
                _ = tokio::signal::ctrl_c() => Err(backfilld::Error::new(backfilld::Kind::Interrupted, "interrupted")),
            }
        }),
        Err(e) => Err(backfilld::Error::internal("cannot start the runtime").with_source(e)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{}", e.render());
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<()> {
    let wanted = |section| args.only.is_empty() || args.only.contains(&section);
    let settings = [("max_wal_size", args.max_wal_size.as_str()), ("shared_buffers", args.shared_buffers.as_str())];
    let world = World::start(args.rows, &settings, args.bigint, args.shape).await?;
    let mut report = Report::new(&world, &settings)?;
    if wanted(Section::Fill) {
        let ways = if args.ways.is_empty() { &fill::WAYS[..] } else { &args.ways };
        fill::run(&world, args.runs, ways, args.foreground, &mut report).await?;
    }
    if wanted(Section::Resources) {
        resources::run(&world, &mut report).await?;
    }
    if wanted(Section::Interrupt) {
        interrupt::run(&world, args.runs, &mut report).await?;
    }
    let reads = args.only.contains(&Section::Reads);
    if wanted(Section::Flip) || wanted(Section::Verify) || reads {
        let ready = world.ready_to_flip().await?;
        if wanted(Section::Verify) {
            verify::run(&world, &ready, args.runs, &mut report).await?;
        }
        if wanted(Section::Flip) {
            flip::run(&world, &ready, args.flips, &mut report).await?;
        }
        if reads {
            reads::run(&world, &ready, args.runs, &mut report).await?;
        }
    }
    if args.only.contains(&Section::Pace) {
        let rate = args.foreground.unwrap_or(200);
        pace::run(&world, args.runs, args.curve, rate, &mut report).await?;
    }
    if args.only.contains(&Section::Saturated) {
        pace::saturated(&world, args.runs, &mut report).await?;
    }
    let path = report.write()?;
    println!("{report}");
    eprintln!("bench: as JSON in {}", path.display());
    Ok(())
}
