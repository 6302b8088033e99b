//! Finds the CLIs on this machine, or installs pinned versions with npm into a cache folder.
//!
//! The pinned versions are those of the project's `npm` folder, lockfiles included. What is newer on PATH serves as well;
//! what is older does not.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};

use crate::agent::environment::Environment;
use crate::agent::programs::{self, numbers};

/// The oldest Node that acpx runs on.
const NODE_MIN: &[u32] = &[22, 13];

/// Packages that belong together, with what npm needs to install just these.
struct Bundle {
    name: &'static str,
    manifest: &'static str,
    lockfile: &'static str,
    options: &'static [&'static str],
}

macro_rules! bundle {
    ($name:literal, $options:expr) => {
        Bundle {
            name: $name,
            manifest: include_str!(concat!("../../npm/", $name, "/package.json")),
            lockfile: include_str!(concat!("../../npm/", $name, "/package-lock.json")),
            options: $options,
        }
    };
}

const CLAUDE: Bundle = bundle!("claude", &[]);
// Optional: a second copy of the claude binary.
const ACPX: Bundle = bundle!("acpx", &["--omit=optional"]);
const NODE: Bundle = bundle!("node", &[]);

/// The other agents, each with the folder of its programs.
const AGENTS: [(Bundle, &str); 4] = [
    (bundle!("codex", &[]), "node_modules/.bin"),
    // Optional: a keyring, and terminals that ask in place of the agent.
    (bundle!("gemini", &["--omit=optional"]), "node_modules/.bin"),
    // The programs alone, as its package's script would choose them.
    (bundle!("opencode", &[]), if ARM { "node_modules/opencode-linux-arm64/bin" } else { "node_modules/opencode-linux-x64-baseline/bin" }),
    // Optional: sounds, pictures, a clipboard, a terminal.
    (bundle!("qwen", &["--omit=optional"]), "node_modules/.bin"),
];
const ARM: bool = cfg!(target_arch = "aarch64");

/// The CLIs, ready to be started.
#[derive(Clone, Debug)]
pub struct Clis {
    /// `claude`.
    pub claude: PathBuf,
    /// `acpx`.
    pub acpx: PathBuf,
    /// A PATH on which both stand, and a Node that they run on.
    pub path: OsString,
}

/// The cache folder that is used where none is named: in the build folder for a program that cargo built, elsewhere one
/// of this user's in the system's folder for temporary files that outlive a restart. Never the user's home.
pub fn default_cache() -> PathBuf {
    let built = std::env::current_exe().ok();
    let target = built.iter().flat_map(|exe| exe.ancestors()).find(|folder| folder.join("CACHEDIR.TAG").is_file());
    target.map_or_else(
        || PathBuf::from(format!("/var/tmp/clawdforge-{}", rustix::process::geteuid().as_raw())),
        |target| target.join("clawdforge-clis"),
    )
}

/// Finds or installs the CLIs. `say` gets a line for each step that takes time.
pub fn clis(cache: &Path, say: &dyn Fn(&str)) -> anyhow::Result<Clis> {
    private_folder(cache)?;
    let mut folders = Vec::new();
    let provide = |folders: &mut Vec<PathBuf>, program: &str, least: &[u32], bundle: &Bundle, bin: &str| {
        if let Some(found) = on_path(program, least) {
            return anyhow::Ok(found);
        }
        let found = installed(cache, bundle, say)?.join(bin);
        folders.extend(found.parent().map(Path::to_owned));
        Ok(found)
    };
    let arch = if ARM { "arm64" } else { "x64" };
    provide(&mut folders, "node", NODE_MIN, &NODE, &format!("node_modules/node-linux-{arch}/bin/node"))?;
    let claude = provide(&mut folders, "claude", &pinned(&CLAUDE, "@anthropic-ai/claude-code")?, &CLAUDE, "node_modules/.bin/claude")?;
    let acpx = provide(&mut folders, "acpx", &pinned(&ACPX, "acpx")?, &ACPX, "node_modules/.bin/acpx")?;
    let path = before(folders, &std::env::var_os("PATH").unwrap_or_default())?;
    Ok(Clis { claude, acpx, path })
}

impl Clis {
    /// The same with another agent: its pinned version, installed now if it was not, stands first on the PATH.
    pub fn with_agent(mut self, name: &str, cache: &Path, say: &dyn Fn(&str)) -> anyhow::Result<Self> {
        let (bundle, programs) =
            AGENTS.iter().find(|(bundle, _)| bundle.name == name).with_context(|| format!("there is no pinned install of {name}"))?;
        private_folder(cache)?;
        self.path = before([installed(cache, bundle, say)?.join(programs)], &self.path)?;
        Ok(self)
    }
}

/// A PATH with some folders before the rest.
fn before(folders: impl IntoIterator<Item = PathBuf>, path: &OsStr) -> anyhow::Result<OsString> {
    Ok(std::env::join_paths(folders.into_iter().chain(std::env::split_paths(path)))?)
}

/// Where a bundle is, installed now if it was not.
fn installed(cache: &Path, bundle: &Bundle, say: &dyn Fn(&str)) -> anyhow::Result<PathBuf> {
    use sha2::{Digest, Sha256};
    let id: String = Sha256::digest(bundle.lockfile).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let folder = cache.join(format!("{}-{id}", bundle.name));
    // One installer of a bundle at a time; it is let go of with the file.
    let lock = fs::File::create(cache.join(format!("{}.lock", bundle.name)))?;
    lock.lock()?;
    if folder.is_dir() {
        return Ok(folder);
    }
    say(&format!("Installing {} with npm into {} …", described(bundle)?, cache.display()));
    // Renamed when it is complete: what was interrupted is never taken for installed.
    let partial = cache.join(format!("{}.partial", bundle.name));
    let npm_cache = cache.join(format!("{}.npm-cache", bundle.name));
    crate::agent::folder::remove_tree(&partial)?;
    fs::create_dir(&partial)?;
    fs::write(partial.join("package.json"), bundle.manifest)?;
    fs::write(partial.join("package-lock.json"), bundle.lockfile)?;
    let mut npm = quiet("npm");
    // Not `ci`: it refuses a lockfile that lacks optional packages which were never published, and acpx names such. With
    // a lockfile that fits its manifest, `install` takes what the lockfile says too, checksums included.
    npm.args(["install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error"]);
    succeed(npm.args(bundle.options).env("npm_config_cache", &npm_cache).current_dir(&partial)).context(
        "npm could not install the CLIs; check that Node.js with npm is installed and that it reaches its registry, or put the CLIs on PATH",
    )?;
    // What the package would do itself, were its script let run: put the platform's binary where its name is.
    let script = partial.join("node_modules/@anthropic-ai/claude-code/install.cjs");
    if script.is_file() {
        succeed(quiet("node").arg(script)).context("claude's installer failed")?;
    }
    fs::rename(&partial, &folder)?;
    crate::agent::folder::remove_tree(&npm_cache)?;
    Ok(folder)
}

/// A command without input, and with the environment that agents get: no secret of the server's.
fn quiet(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_clear().envs(Environment::inherited().iter()).stdin(Stdio::null());
    command
}

/// Runs a command; its error is its output.
fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("{} can't be started", command.get_program().display()))?;
    ensure!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// The program on PATH, if it is at least so new.
fn on_path(program: &str, least: &[u32]) -> Option<PathBuf> {
    let found = programs::find(OsStr::new(program), &Environment::inherited())?;
    // A folder that is not there: asking for the version must not leave traces in the user's home.
    let output = quiet(&found).arg("--version").env("HOME", "/nonexistent").output().ok()?;
    let version = programs::version_in(&String::from_utf8_lossy(&output.stdout))?;
    (numbers(&version) >= least.to_vec()).then_some(found)
}

fn dependencies(bundle: &Bundle) -> anyhow::Result<Vec<(String, String)>> {
    let manifest: serde_json::Value = serde_json::from_str(bundle.manifest)?;
    let sections = ["dependencies", "optionalDependencies"].into_iter().filter_map(|section| manifest[section].as_object());
    Ok(sections.flatten().map(|(name, version)| (name.clone(), version.as_str().unwrap_or_default().to_owned())).collect())
}

fn pinned(bundle: &Bundle, package: &str) -> anyhow::Result<Vec<u32>> {
    let found = dependencies(bundle)?.into_iter().find(|(name, _)| name == package);
    Ok(numbers(&found.with_context(|| format!("{package} is not pinned"))?.1))
}

fn described(bundle: &Bundle) -> anyhow::Result<String> {
    Ok(dependencies(bundle)?.iter().map(|(name, version)| format!("{name} {version}")).collect::<Vec<_>>().join(", "))
}

/// Makes the cache folder, or makes sure that nobody else could have put programs into it.
fn private_folder(folder: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("the cache folder {} can't be made", folder.display()))?;
    let metadata = fs::symlink_metadata(folder)?;
    if !metadata.is_dir() || metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
        bail!("the cache folder {} may be written by other users; name another one with --cache", folder.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bundle_is_pinned_to_one_version() {
        for bundle in [&CLAUDE, &ACPX, &NODE].into_iter().chain(AGENTS.iter().map(|(bundle, _)| bundle)) {
            for (name, version) in dependencies(bundle).unwrap() {
                assert_eq!(numbers(&version).len(), 3, "{name} {version}");
            }
        }
    }
}
