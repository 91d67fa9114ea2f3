//! The run directory: files that appear whole or not at all, and where each thing lies.

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes a file so that a reader, or a crash, sees the old content or the new, never a part.
///
/// # Errors
/// When the folder cannot be written.
pub fn publish(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = hidden(path, "tmp");
    let renamed = || fs::rename(&temporary, path).map_err(|e| Error::io("write", path, &e));
    write_synced(&temporary, bytes).and_then(|()| renamed()).inspect_err(|_| drop(fs::remove_file(&temporary)))?;
    sync_folder(folder_of(path))
}

/// A name beside a path that no other process takes.
fn hidden(path: &Path, what: &str) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{}.{what}", std::process::id()))
}

/// Writes a file at a path.
pub type Writer<'a> = Box<dyn FnOnce(&Path) -> Result<()> + 'a>;

/// What a file is to hold.
pub enum Content<'a> {
    /// These bytes.
    Bytes(Vec<u8>),
    /// What this writes to a path.
    Written(Writer<'a>),
}

/// Publishes a folder with these files in one step; a path may hold one level of folders. An old folder makes room for it,
/// and is there until the new one is whole.
///
/// # Errors
/// When the folder cannot be written; then all is as it was.
pub fn publish_folder(path: &Path, files: Vec<(String, Content<'_>)>) -> Result<()> {
    let (temporary, old) = (hidden(path, "tmp"), hidden(path, "old"));
    for left in [&temporary, &old].into_iter().filter(|p| p.exists()) {
        fs::remove_dir_all(left).map_err(|e| Error::io("clear", left, &e))?;
    }
    write_folder(&temporary, files).inspect_err(|_| drop(fs::remove_dir_all(&temporary)))?;
    if path.exists() {
        fs::rename(path, &old).map_err(|e| Error::io("replace", path, &e))?;
    }
    if let Err(e) = fs::rename(&temporary, path) {
        let _ = fs::rename(&old, path);
        let _ = fs::remove_dir_all(&temporary);
        return Err(Error::io("write", path, &e));
    }
    let _ = fs::remove_dir_all(&old);
    sync_folder(folder_of(path))
}

fn write_folder(root: &Path, files: Vec<(String, Content<'_>)>) -> Result<()> {
    fs::create_dir_all(root).map_err(|e| Error::io("create", root, &e))?;
    for (name, content) in files {
        let file = root.join(name);
        let folder = file.parent().unwrap_or(root);
        fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, &e))?;
        match content {
            Content::Bytes(bytes) => write_synced(&file, &bytes)?,
            Content::Written(write) => {
                write(&file)?;
                sync_folder(&file)?;
            }
        }
        sync_folder(folder)?;
    }
    sync_folder(root)
}

/// Where a path's last part lies.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| Error::io("write", path, &e))
}

/// Waits until a folder, or a file that was written elsewhere, is on the disk.
fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::io("write", path, &e))
}

/// Prefix of a checkpoint's folder name.
const STEP: &str = "step-";

/// A run's directory.
#[derive(Debug, Clone)]
pub struct RunDir {
    root: PathBuf,
}

impl RunDir {
    /// The run in a directory, which need not exist yet.
    pub fn at(root: &Path) -> Self {
        RunDir { root: root.to_owned() }
    }

    /// Makes the directory where it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create(root: &Path) -> Result<Self> {
        fs::create_dir_all(root.join("checkpoints")).map_err(|e| Error::io("create", root, &e))?;
        Ok(Self::at(root))
    }

    /// Takes the directory for this process, as long as the file lives. A file system without locks gives it to all.
    ///
    /// # Errors
    /// When another process has it.
    pub fn lock(&self) -> Result<File> {
        let folder = File::open(&self.root).map_err(|e| Error::io("open", &self.root, &e))?;
        match folder.try_lock() {
            Err(TryLockError::WouldBlock) => Err(Error::usage(format!("a run in {} goes on", self.root.display()))
                .with_hint("wait until it ends, or stop it with SIGTERM")),
            Ok(()) | Err(TryLockError::Error(_)) => Ok(folder),
        }
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Folder of the checkpoint after `step` steps.
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.root.join("checkpoints").join(format!("{STEP}{step:08}"))
    }

    /// Steps that have a checkpoint, ascending.
    pub fn checkpoints(&self) -> Vec<u64> {
        let entries = fs::read_dir(self.root.join("checkpoints")).into_iter().flatten().flatten();
        let mut steps: Vec<u64> =
            entries.filter_map(|e| e.file_name().to_str()?.strip_prefix(STEP)?.parse().ok()).collect();
        steps.sort_unstable();
        steps
    }

    /// Deletes all but the newest `keep` checkpoints, and all but the newest up to step `healthy`; `keep` 0 keeps all.
    pub fn prune(&self, keep: usize, healthy: u64) {
        let steps = self.checkpoints();
        let spared = steps.iter().rev().find(|step| **step <= healthy);
        if keep > 0 && steps.len() > keep {
            steps[..steps.len() - keep].iter().filter(|step| Some(*step) != spared).for_each(|step| self.delete(*step));
        }
    }

    /// Deletes a checkpoint: it is none any more at once. What of its files cannot go yet (a network disk keeps those that
    /// are open) goes with a later one, as does what a crash left of a checkpoint that was being written.
    pub fn delete(&self, step: u64) {
        let folder = self.root.join("checkpoints");
        // No reader waits for the space, and a run does not end because a disk keeps it.
        let _ = fs::rename(self.checkpoint(step), folder.join(format!(".{STEP}{step:08}.old")));
        self.sweep();
    }

    /// Deletes what a crash left of checkpoints that were being written or deleted. Only for who has the lock.
    pub fn sweep(&self) {
        let hidden = format!(".{STEP}");
        for entry in fs::read_dir(self.root.join("checkpoints")).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&hidden) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_appear_whole_and_old_ones_go() {
        let dir = tempfile::tempdir().expect("a folder");
        let run = RunDir::create(&dir.path().join("run")).expect("made");
        for step in [3, 12, 7] {
            let write = |path: &Path| fs::write(path, [1, 2]).map_err(|e| Error::io("write", path, &e));
            let files = vec![
                ("a.txt".to_owned(), Content::Bytes(vec![step as u8])),
                ("sub/b.txt".to_owned(), Content::Written(Box::new(write))),
            ];
            publish_folder(&run.checkpoint(step), files).expect("written");
        }
        // What a crash leaves behind is no checkpoint.
        fs::create_dir(run.root().join("checkpoints/.step-00000099.tmp")).expect("made");
        assert_eq!(run.checkpoints(), [3, 7, 12]);
        assert_eq!(fs::read(run.checkpoint(12).join("sub/b.txt")).expect("there"), [1, 2]);
        run.prune(2, 0);
        assert_eq!(run.checkpoints(), [7, 12]);
        // The newest before an alarm's first sign stays, and what a crash left goes with the first that is deleted.
        publish_folder(&run.checkpoint(13), Vec::new()).expect("written");
        run.prune(1, 9);
        assert_eq!(run.checkpoints(), [7, 13]);
        assert_eq!(fs::read_dir(run.root().join("checkpoints")).expect("there").count(), 2);
        // What cannot be written leaves the old as it was, and nothing beside it.
        let fails = |_: &Path| Err(Error::failure("no"));
        let files = || vec![("a.txt".to_owned(), Content::Written(Box::new(fails)))];
        assert!(publish_folder(&run.checkpoint(13), files()).is_err());
        assert_eq!(run.checkpoints(), [7, 13]);
        publish_folder(&run.checkpoint(13), vec![("c.txt".to_owned(), Content::Bytes(vec![3]))]).expect("replaced");
        assert_eq!(fs::read(run.checkpoint(13).join("c.txt")).expect("there"), [3]);
        fs::create_dir(run.root().join("checkpoints/.step-00000099.tmp")).expect("made");
        run.sweep();
        assert_eq!(fs::read_dir(run.root().join("checkpoints")).expect("there").count(), 2);
        publish(&run.file("x"), b"one").expect("written");
        publish(&run.file("x"), b"two").expect("written");
        assert_eq!(fs::read(run.file("x")).expect("there"), b"two");
        assert_eq!([folder_of(Path::new("x")), folder_of(Path::new("a/x"))], [Path::new("."), Path::new("a")]);
    }
}
