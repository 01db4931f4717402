//! Programs that tests start, and end.

use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Where this test run keeps its files.
pub fn scratch() -> PathBuf {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let base = std::env::var_os("SLUICE_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = base.join(format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// A program that was started here and ends with its value.
pub struct Process {
    pub child: Child,
    dir: PathBuf,
}

impl Process {
    pub fn start(command: &mut Command, dir: PathBuf) -> Self {
        let name = command.get_program().to_owned();
        let child = command.spawn().unwrap_or_else(|error| panic!("{} cannot be started: {error}", name.display()));
        if let Some(base) = std::env::var_os("SLUICE_TEST_DIR") {
            // So that tests/run can end it should this process be interrupted.
            let pids = PathBuf::from(base).join("pids");
            std::fs::create_dir_all(&pids).and_then(|()| std::fs::write(pids.join(child.id().to_string()), "")).unwrap();
        }
        Self { child, dir }
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").arg(format!("-{signal}")).arg(self.child.id().to_string()).status();
        assert!(status.unwrap().success(), "kill -{signal}");
        // Threads stop one by one; until the last has, it may still answer.
        while signal == "STOP" && !self.stands_still() {
            std::thread::yield_now();
        }
    }

    /// Whether every thread is stopped.
    fn stands_still(&self) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        tasks.flatten().all(|task| {
            let line = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            line.rsplit(") ").next().is_none_or(|state| state.is_empty() || state.starts_with(['T', 'Z', 'X']))
        })
    }

    /// Resident memory in bytes.
    pub fn resident(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// The most that it ever was.
    pub fn resident_peak(&self) -> u64 {
        self.memory("VmHWM:")
    }

    fn memory(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
