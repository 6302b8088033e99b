//! How long a caller waits, beside the bare CLIs: `cargo bench --bench latency`, seven minutes.
//!
//! Everything is real but the model, which answers at once. Each round takes the bare CLI, the server without standbys
//! (cold) and the server with four (warm) in turn, so that what else the machine does meets all three. Compared are
//! medians. The table is also written as `docs/latency.json` and drawn as `docs/latency.svg`.

#![allow(missing_docs, reason = "a program")]

mod server;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use clawdforge::agent::environment::Environment;
use clawdforge::demo::{self, install, install::Clis, stub::Stub};
use server::{Server, acpx, bare_turn, create, median, ms, start_real, take_turn, time};

const ROUNDS: usize = 12;
const AT_ONCE: usize = 4;
/// From the answer of one to the start of the next. acpx ends a second after its answer.
const PAUSE: Duration = Duration::from_secs(2);
/// In which four standbys are started, one after the other.
const PAUSE_AT_ONCE: Duration = Duration::from_secs(8);

/// Medians of the bare CLI, cold and warm.
struct Row {
    name: &'static str,
    times: [Duration; 3],
}

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let clis = install::clis(&install::default_cache(), &|step| println!("{step}")).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let stub = runtime.block_on(Stub::start()).unwrap();
    let (home, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let environment = demo::environment(&clis, &stub.url(), home.path());
    let [cold, warm] = ["0", "4"].map(|standby| start_real(&environment, &clis, &[("CLAWDFORGE_STANDBY", standby)]));
    let tokens = [cold.mint(), warm.mint()];

    let bare_run = || run_bare(&environment, &clis, folder.path());
    let run_on = |server: &Server, token: &str| time(|| run(server, token));
    let cold_run = || run_on(&cold, &tokens[0]);
    let warm_run = || run_on(&warm, &tokens[1]);
    let mut rows = vec![measure("run", PAUSE, [&bare_run, &cold_run, &warm_run])];
    let memory_claude = memory_of_standbys(&warm, "-p");
    rows.push(measure_at_once("run, 4 at once", [&|_| bare_run(), &|_| cold_run(), &|_| warm_run()]));

    let sessions: [Vec<String>; 2] = [(&cold, &tokens[0]), (&warm, &tokens[1])].map(|(server, token)| {
        // The first turn starts the agent.
        (0..AT_ONCE).map(|_| create(server, token)).inspect(|session| take_turn(server, token, session)).collect()
    });
    for name in ["bare0", "bare1", "bare2", "bare3"] {
        assert!(acpx(&environment, &clis, folder.path(), &["sessions", "new", "--name", name]).output().unwrap().status.success());
        bare_turn(acpx(&environment, &clis, folder.path(), &["prompt", "-s", name, "--file", "-"]));
    }
    let bare_turn = |n: usize| bare_turn(acpx(&environment, &clis, folder.path(), &["prompt", "-s", &format!("bare{n}"), "--file", "-"]));
    let cold_turn = |n: usize| time(|| take_turn(&cold, &tokens[0], &sessions[0][n]));
    let warm_turn = |n: usize| time(|| take_turn(&warm, &tokens[1], &sessions[1][n]));
    rows.push(measure("turn", PAUSE, [&|| bare_turn(0), &|| cold_turn(0), &|| warm_turn(0)]));
    let memory_acpx = memory_of_standbys(&warm, "prompt");
    rows.push(measure_at_once("turn, 4 at once", [&bare_turn, &cold_turn, &warm_turn]));
    drop((cold, warm));
    for n in 0..AT_ONCE {
        let _ = acpx(&environment, &clis, folder.path(), &["sessions", "close", &format!("bare{n}")]).output();
    }
    let load = [0, 4].map(|standby| under_load(&environment, &clis, standby));

    println!("\n{:<20} {:>10} {:>10} {:>10} {:>8} {:>8}", "median", "bare CLI", "cold", "warm", "cold/", "warm/");
    for Row { name, times } in &rows {
        let [bare, cold, warm] = times.map(ms);
        println!("{name:<20} {bare:>7.0} ms {cold:>7.0} ms {warm:>7.0} ms {:>8.2} {:>8.2}", cold / bare, warm / bare);
    }
    println!("\nmemory of an idle standby: claude {memory_claude:.0} MiB, acpx {memory_acpx:.0} MiB (proportional set size)");
    println!("32 runs, 4 places: {:.1} s without standbys, {:.1} s with four", load[0].as_secs_f64(), load[1].as_secs_f64());
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    std::fs::write(docs.join("latency.json"), json(&rows, memory_claude, memory_acpx, load)).unwrap();
    std::fs::write(docs.join("latency.svg"), svg(&rows)).unwrap();
}

/// Takes the three in turn. The first round is not counted.
fn measure(name: &'static str, pause: Duration, each: [&dyn Fn() -> Duration; 3]) -> Row {
    let mut times: [Vec<Duration>; 3] = Default::default();
    for round in 0..=ROUNDS {
        for (taken, work) in times.iter_mut().zip(each) {
            let took = work();
            if round > 0 {
                taken.push(took);
            }
        }
        std::thread::sleep(pause);
    }
    Row { name, times: times.map(median) }
}

/// The same, four of a kind at once; each of the four counts.
fn measure_at_once(name: &'static str, each: [&(dyn Fn(usize) -> Duration + Sync); 3]) -> Row {
    let mut times: [Vec<Duration>; 3] = Default::default();
    for round in 0..=ROUNDS {
        for (taken, work) in times.iter_mut().zip(each) {
            let took: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..AT_ONCE).map(|n| scope.spawn(move || work(n))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            if round > 0 {
                taken.extend(took);
            }
        }
        std::thread::sleep(PAUSE_AT_ONCE);
    }
    Row { name, times: times.map(median) }
}

/// What a program would write without the server: start it, give it the prompt, wait for it.
fn run_bare(environment: &Environment, clis: &Clis, folder: &Path) -> Duration {
    time(|| {
        let mut command = Command::new(&clis.claude);
        command.args(["-p", "--output-format", "json", "--model", "sonnet"]).current_dir(folder);
        command.env_clear().envs(environment.iter()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"Hello.").unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("\"is_error\":false"));
    })
}

fn run(server: &Server, token: &str) {
    let answer = server.ask("POST", "/run", token, r#"{"prompt": "Hello."}"#);
    assert!(answer.contains("\"ok\":true"), "{answer}");
}

/// How long 32 runs take that are asked for at once, with four places.
fn under_load(environment: &Environment, clis: &Clis, standby: usize) -> Duration {
    let settings = [("CLAWDFORGE_STANDBY", &*standby.to_string()), ("CLAWDFORGE_MAX_RUNS", "4")];
    let server = start_real(environment, clis, &settings);
    let token = server.mint();
    (0..4).for_each(|_| run(&server, &token));
    std::thread::sleep(PAUSE_AT_ONCE);
    time(|| std::thread::scope(|scope| (0..32).for_each(|_| drop(scope.spawn(|| run(&server, &token))))))
}

/// MiB of memory that a waiting process takes, what it shares with others counted in parts.
fn memory_of_standbys(server: &Server, word: &str) -> f64 {
    std::thread::sleep(PAUSE_AT_ONCE);
    let pids = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_it = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        parent == Some(server.pid()) && line.split(|byte| *byte == 0).any(|argument| argument == word.as_bytes())
    };
    let pss = |pid: u32| {
        let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        rollup.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok())
    };
    let all: Vec<_> = pids.filter(is_it).filter_map(pss).collect();
    assert!(!all.is_empty(), "no standby waits");
    all.iter().sum::<f64>() / f64::from(u32::try_from(all.len()).unwrap()) / 1024.0
}

fn json(rows: &[Row], memory_claude: f64, memory_acpx: f64, load: [Duration; 2]) -> String {
    let round = |value: f64| (value * 10.0).round() / 10.0;
    let rows: serde_json::Map<_, _> = rows
        .iter()
        .map(|Row { name, times }| {
            let [bare, cold, warm] = times.map(|time| round(ms(time)));
            ((*name).to_owned(), serde_json::json!({"bare_ms": bare, "cold_ms": cold, "warm_ms": warm}))
        })
        .collect();
    let all = serde_json::json!({
        "medians": rows,
        "standby_mib": {"claude": round(memory_claude), "acpx": round(memory_acpx)},
        "load_32_runs_4_places_secs": {"standby_0": round(load[0].as_secs_f64()), "standby_4": round(load[1].as_secs_f64())},
    });
    format!("{all:#}\n")
}

/// A bar for each median.
fn svg(rows: &[Row]) -> String {
    const COLOURS: [(&str, &str); 3] = [("bare CLI", "#9aa5b1"), ("clawdforge, cold", "#7aa2d6"), ("clawdforge, warm", "#2f6f4f")];
    let longest = rows.iter().flat_map(|row| row.times).max().map_or(1.0, ms);
    let height = 40 + rows.len() * 76;
    let mut bars = String::new();
    for (n, (label, colour)) in COLOURS.iter().enumerate() {
        let x = 130 + n * 170;
        let _ = write!(bars, r#"<rect x="{x}" y="8" width="12" height="12" fill="{colour}"/><text x="{}" y="18">{label}</text>"#, x + 18);
    }
    for (n, Row { name, times }) in rows.iter().enumerate() {
        let top = 40 + n * 76;
        let _ = write!(bars, r#"<text x="120" y="{}" text-anchor="end">{name}</text>"#, top + 34);
        for (m, (time, (_, colour))) in times.iter().zip(COLOURS).enumerate() {
            let (y, width) = (top + m * 20, ms(*time) / longest * 480.0);
            let _ = write!(
                bars,
                r#"<rect x="130" y="{y}" width="{width:.1}" height="16" fill="{colour}"/><text x="{:.1}" y="{}">{:.0} ms</text>"#,
                width + 136.0,
                y + 13,
                ms(*time)
            );
        }
    }
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="700" height="{height}" font-family="sans-serif" font-size="13" fill="#222"><rect width="700" height="{height}" fill="#fff"/>{bars}</svg>
"##
    )
}
