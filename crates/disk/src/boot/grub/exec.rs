//! Runs a parsed script: variables, functions, menus, and the few commands that matter.

use super::super::CONFIG_MAX;
use super::super::tree::FileTree;
use super::lex::{Piece, Word};
use super::parse::{self, Block, Stmt};
use super::{normal, parse_grubenv, test_expr};
use std::collections::BTreeMap;

/// Commands run in one search, over all entries.
const STEPS_MAX: u64 = 100_000;
/// Bytes that expansions may make in one search.
const EXPANDED_MAX: usize = 4 << 20;
/// Bytes of one value.
const VALUE_MAX: usize = 64 << 10;
/// Variables, and functions.
const NAMES_MAX: usize = 1024;
/// Entries of one menu.
const ENTRIES_MAX: usize = 512;
/// Functions in functions, files in files.
const DEPTH_MAX: usize = 48;

/// One entry of the menu.
#[derive(Clone, Debug)]
pub(crate) struct MenuEntry {
    pub(crate) title: String,
    pub(crate) id: String,
    pub(crate) submenu: bool,
    args: Vec<String>,
    body: Block,
}

/// How a block ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    /// With this status.
    Done(bool),
    Break,
    Continue,
    Return(bool),
}

/// File system, kernel, command line, initrds.
pub(crate) type Boot = (usize, String, String, Vec<(usize, String)>);

/// The state of the interpreter.
pub(crate) struct Machine<'a> {
    trees: &'a [&'a dyn FileTree],
    home: usize,
    vars: BTreeMap<String, String>,
    functions: BTreeMap<String, Block>,
    /// The menu, so far.
    pub(crate) entries: Vec<MenuEntry>,
    /// `$1` and so on of the function or entry that runs.
    args: Vec<String>,
    kernel: Option<(usize, String, String)>,
    initrds: Vec<(usize, String)>,
    steps: u64,
    expanded: usize,
    depth: usize,
}

impl<'a> Machine<'a> {
    /// A fresh interpreter whose `$prefix` is `dir` of file system number `home`.
    pub(crate) fn new(trees: &'a [&'a dyn FileTree], home: usize, dir: &str) -> Self {
        let mut vars = BTreeMap::new();
        for feature in [
            "200_final",
            "all_video_module",
            "chainloader_bpb",
            "default_font_path",
            "menuentry_id",
            "menuentry_options",
            "nativedisk_cmd",
            "ntldr",
            "platform_search_hint",
            "timeout_style",
        ] {
            vars.insert(format!("feature_{feature}"), "y".to_owned());
        }
        for (name, value) in [
            ("grub_cpu", "i386".to_owned()),
            ("grub_platform", "pc".to_owned()),
            ("root", format!("fs{home}")),
            ("prefix", format!("(fs{home}){dir}")),
            ("config_directory", format!("(fs{home}){dir}")),
            ("config_file", format!("(fs{home}){dir}/grub.cfg")),
        ] {
            vars.insert(name.to_owned(), value);
        }
        Self {
            trees,
            home,
            vars,
            functions: BTreeMap::new(),
            entries: Vec::new(),
            args: Vec::new(),
            kernel: None,
            initrds: Vec::new(),
            steps: 0,
            expanded: 0,
            depth: 0,
        }
    }

    /// Runs a whole script.
    pub(crate) fn run(&mut self, script: &Block) -> Result<(), String> {
        self.block(script).map(|_| ())
    }

    /// What the script wants to boot.
    pub(crate) fn default_entry(&self) -> String {
        self.vars.get("default").cloned().unwrap_or_default()
    }

    /// What a script without a menu loaded.
    pub(crate) fn booted(&mut self) -> Option<Boot> {
        let (fs, kernel, cmdline) = self.kernel.take()?;
        Some((fs, kernel, cmdline, std::mem::take(&mut self.initrds)))
    }

    /// Runs an entry and returns what it loads, if it loads Linux. Leaves no trace in the variables.
    pub(crate) fn boot(&mut self, entry: &MenuEntry) -> Result<Option<Boot>, String> {
        let kept = (
            self.vars.clone(),
            self.kernel.take(),
            std::mem::take(&mut self.initrds),
        );
        let result = self.with_args(entry.args.clone(), &entry.body);
        let booted = self.booted();
        (self.vars, self.kernel, self.initrds) = kept;
        result.map(|_| booted)
    }

    /// The entries of a submenu.
    pub(crate) fn open_submenu(&mut self, entry: &MenuEntry) -> Result<Vec<MenuEntry>, String> {
        let kept = (self.vars.clone(), std::mem::take(&mut self.entries));
        let result = self.with_args(entry.args.clone(), &entry.body);
        let inner = std::mem::take(&mut self.entries);
        (self.vars, self.entries) = kept;
        result.map(|_| inner)
    }

    fn with_args(&mut self, args: Vec<String>, body: &Block) -> Result<Flow, String> {
        let kept = std::mem::replace(&mut self.args, args);
        let result = self.block(body);
        self.args = kept;
        result
    }

    fn block(&mut self, block: &Block) -> Result<Flow, String> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err("functions or files call each other too deeply".to_owned());
        }
        let mut flow = Flow::Done(true);
        for stmt in block.iter() {
            flow = self.stmt(stmt)?;
            if let Flow::Done(status) = flow {
                self.vars
                    .insert("?".to_owned(), if status { "0" } else { "1" }.to_owned());
            } else {
                break;
            }
        }
        self.depth -= 1;
        Ok(flow)
    }

    fn step(&mut self) -> Result<(), String> {
        self.steps += 1;
        if self.steps > STEPS_MAX {
            return Err(format!(
                "stopped after {STEPS_MAX} commands: does the script loop forever?"
            ));
        }
        Ok(())
    }

    fn stmt(&mut self, stmt: &Stmt) -> Result<Flow, String> {
        self.step()?;
        match stmt {
            Stmt::Command(words) => {
                let words = self.expand(words)?;
                self.command(&words)
            }
            Stmt::If(arms, otherwise) => {
                for (condition, body) in arms {
                    match self.block(condition)? {
                        Flow::Done(true) => return self.block(body),
                        Flow::Done(false) => {}
                        other => return Ok(other),
                    }
                }
                self.block(otherwise)
            }
            Stmt::While {
                until,
                condition,
                body,
            } => loop {
                self.step()?;
                match self.block(condition)? {
                    Flow::Done(status) if status == *until => return Ok(Flow::Done(true)),
                    Flow::Done(_) => {}
                    other => return Ok(other),
                }
                match self.block(body)? {
                    Flow::Break => return Ok(Flow::Done(true)),
                    Flow::Return(status) => return Ok(Flow::Return(status)),
                    Flow::Done(_) | Flow::Continue => {}
                }
            },
            Stmt::For { name, words, body } => {
                for value in self.expand(words)? {
                    self.step()?;
                    self.set(name, value)?;
                    match self.block(body)? {
                        Flow::Break => break,
                        Flow::Return(status) => return Ok(Flow::Return(status)),
                        Flow::Done(_) | Flow::Continue => {}
                    }
                }
                Ok(Flow::Done(true))
            }
            Stmt::Function { name, body } => {
                if self.functions.len() >= NAMES_MAX {
                    return Err("too many functions".to_owned());
                }
                self.functions.insert(name.clone(), body.clone());
                Ok(Flow::Done(true))
            }
            Stmt::Menu { submenu, words, body } => {
                let words = self.expand(words)?;
                self.menu(*submenu, words, body.clone())?;
                Ok(Flow::Done(true))
            }
        }
    }

    /// `menuentry TITLE [--class C]... [--users U] [--unrestricted] [--hotkey K] [--id ID] [ARG]...`
    fn menu(&mut self, submenu: bool, words: Vec<String>, body: Block) -> Result<(), String> {
        if self.entries.len() >= ENTRIES_MAX {
            return Err(format!("more than {ENTRIES_MAX} menu entries"));
        }
        let (mut id, mut plain) = (String::new(), Vec::new());
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--id" => id = words.next().unwrap_or_default(),
                "--class" | "--users" | "--hotkey" | "--source" => {
                    words.next();
                }
                other => {
                    if let Some(value) = other.strip_prefix("--id=") {
                        id = value.to_owned();
                    } else if !other.starts_with("--") {
                        plain.push(word);
                    }
                }
            }
        }
        let title = plain.first().cloned().unwrap_or_default();
        self.entries.push(MenuEntry {
            id: if id.is_empty() { title.clone() } else { id },
            title,
            submenu,
            args: plain,
            body,
        });
        Ok(())
    }

    fn set(&mut self, name: &str, value: String) -> Result<(), String> {
        if value.len() > VALUE_MAX || (self.vars.len() >= NAMES_MAX && !self.vars.contains_key(name)) {
            return Err("too many or too large variables".to_owned());
        }
        self.vars.insert(name.to_owned(), value);
        Ok(())
    }

    fn lookup(&self, name: &str) -> String {
        match name {
            "@" | "*" => self.args.iter().skip(1).cloned().collect::<Vec<_>>().join(" "),
            "#" => self.args.len().saturating_sub(1).to_string(),
            _ => match name.parse::<usize>() {
                Ok(n) => self.args.get(n).cloned().unwrap_or_default(),
                Err(_) => self.vars.get(name).cloned().unwrap_or_default(),
            },
        }
    }

    fn expand(&mut self, words: &[Word]) -> Result<Vec<String>, String> {
        let mut out = Vec::new();
        for word in words {
            let mut current: Option<String> = None;
            for piece in word {
                match piece {
                    Piece::Text { text, .. } => current.get_or_insert_default().push_str(text),
                    Piece::Var { name, quoted: true } => {
                        let value = self.lookup(name);
                        current.get_or_insert_default().push_str(&value);
                    }
                    Piece::Var { name, quoted: false } => {
                        let value = self.lookup(name);
                        let mut parts = value.split_whitespace().peekable();
                        if value.starts_with(char::is_whitespace) {
                            out.extend(current.take());
                        }
                        while let Some(part) = parts.next() {
                            current.get_or_insert_default().push_str(part);
                            if parts.peek().is_some() {
                                out.extend(current.take());
                            }
                        }
                        if value.ends_with(char::is_whitespace) {
                            out.extend(current.take());
                        }
                    }
                }
                let len = current.as_ref().map_or(0, String::len);
                self.expanded += len;
                if len > VALUE_MAX || self.expanded > EXPANDED_MAX {
                    return Err("a value grows without end".to_owned());
                }
            }
            out.extend(current);
        }
        Ok(out)
    }

    fn device(&self, name: &str) -> usize {
        name.strip_prefix("fs")
            .and_then(|n| n.parse::<usize>().ok())
            .filter(|n| *n < self.trees.len())
            // A partition by number, which is not to be trusted.
            .unwrap_or(self.home)
    }

    /// The file system and path of a file name, `(device)/path` or a path on `$root`.
    fn locate(&self, name: &str) -> (usize, String) {
        if let Some((device, path)) = name.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
            return (self.device(device), normal(path));
        }
        let root = self.lookup("root");
        (self.device(&root), normal(name))
    }

    fn kind_of(&self, name: &str) -> Option<bool> {
        let (fs, path) = self.locate(name);
        self.trees.get(fs).and_then(|t| t.is_dir(&path).ok().flatten())
    }

    fn read(&self, name: &str) -> Option<Vec<u8>> {
        let (fs, path) = self.locate(name);
        self.trees
            .get(fs)
            .and_then(|t| t.read(&path, CONFIG_MAX).ok().flatten())
    }

    fn command(&mut self, words: &[String]) -> Result<Flow, String> {
        let Some((name, args)) = words.split_first() else {
            return Ok(Flow::Done(true));
        };
        if let Some(body) = self.functions.get(name).cloned() {
            return Ok(match self.with_args(words.to_vec(), &body)? {
                Flow::Return(status) => Flow::Done(status),
                other => other,
            });
        }
        let status = match name.as_str() {
            "set" => match args.first().and_then(|a| a.split_once('=')) {
                Some((key, value)) => {
                    self.set(key, value.to_owned())?;
                    true
                }
                None => true,
            },
            "unset" => {
                for arg in args {
                    self.vars.remove(arg);
                }
                true
            }
            "[" => match args.split_last() {
                Some((last, inner)) if last == "]" => self.test(inner),
                _ => false,
            },
            "test" => self.test(args),
            "search" | "search.fs_uuid" | "search.fs_label" | "search.file" => self.search(name, args)?,
            "load_env" => self.load_env(args)?,
            "linux" | "linux16" | "linuxefi" => self.linux(args),
            "initrd" | "initrd16" | "initrdefi" => {
                for arg in args.iter().take(16) {
                    let at = self.locate(arg);
                    self.initrds.push(at);
                }
                true
            }
            "source" | "." | "configfile" | "normal" => {
                let Some(text) = args.first().and_then(|a| self.read(a)) else {
                    return Ok(Flow::Done(false));
                };
                // Reading and parsing is work too.
                self.steps = self.steps.saturating_add(text.len() as u64 / 64);
                self.step()?;
                let script = parse::parse(&String::from_utf8_lossy(&text))?;
                if name != "source" && name != "." {
                    self.entries.clear();
                }
                return self.block(&script);
            }
            "true" => true,
            "false" => false,
            "break" => return Ok(Flow::Break),
            "continue" => return Ok(Flow::Continue),
            "return" => return Ok(Flow::Return(args.first().is_none_or(|n| n == "0"))),
            "setparams" => {
                self.args = words.to_vec();
                true
            }
            // What has no meaning without a screen, a keyboard and a loader, and always works.
            "export" | "insmod" | "rmmod" | "echo" | "save_env" | "terminal_input" | "terminal_output"
            | "terminal" | "serial" | "loadfont" | "play" | "sleep" | "clear" | "background_image"
            | "background_color" | "boot" | "gfxpayload" | "blscfg" | "recordfail" | "load_video"
            | "savedefault" | "nativedisk" | "hwmatch" | "increment" | "decrement" | "rmod" | "module"
            | "acpi" => true,
            other => match other.split_once('=') {
                Some((key, value)) if !key.is_empty() => {
                    self.set(key, value.to_owned())?;
                    true
                }
                // Unknown: as a command that fails, so that `if` takes the other way.
                _ => false,
            },
        };
        Ok(Flow::Done(status))
    }

    fn test(&mut self, words: &[String]) -> bool {
        // File tests walk directories: they count as more than one step.
        let mut lookups = 0_u64;
        let result = test_expr::evaluate(words, &mut |path| {
            lookups += 1;
            if lookups > 64 { None } else { self.kind_of(path) }
        });
        self.steps = self.steps.saturating_add(lookups * 20);
        result
    }

    fn linux(&mut self, args: &[String]) -> bool {
        let Some((path, args)) = args.split_first() else {
            return false;
        };
        let (fs, path) = self.locate(path);
        let quoted: Vec<String> = args
            .iter()
            .map(|a| {
                if a.contains(char::is_whitespace) {
                    format!("\"{a}\"")
                } else {
                    a.clone()
                }
            })
            .collect();
        self.kernel = Some((fs, path, quoted.join(" ")));
        self.initrds.clear();
        true
    }

    fn load_env(&mut self, args: &[String]) -> Result<bool, String> {
        let mut file = "${prefix}/grubenv".replace("${prefix}", &self.lookup("prefix"));
        let mut only = Vec::new();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "-f" | "--file" => file = args.next().cloned().unwrap_or_default(),
                "-s" | "--skip-sig" => {}
                other => match other.strip_prefix("--file=") {
                    Some(name) => file = name.to_owned(),
                    None => only.push(other.to_owned()),
                },
            }
        }
        let Some(bytes) = self.read(&file) else {
            return Ok(false);
        };
        self.steps = self.steps.saturating_add(100);
        for (key, value) in parse_grubenv(&bytes) {
            if only.is_empty() || only.contains(&key) {
                self.set(&key, value)?;
            }
        }
        Ok(true)
    }

    /// `search [--no-floppy] [--set[=VAR]] [--hint...] --fs-uuid|--label|--file NAME`
    fn search(&mut self, command: &str, args: &[String]) -> Result<bool, String> {
        let mut by = match command {
            "search.fs_label" => "label",
            "search.file" => "file",
            "search.fs_uuid" => "uuid",
            _ => "",
        };
        let mut variable = None;
        let mut names = Vec::new();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--fs-uuid" | "-u" => by = "uuid",
                "--label" | "--fs-label" | "-l" => by = "label",
                "--file" | "-f" => by = "file",
                "--set" | "-s" => variable = Some("root".to_owned()),
                "--hint" | "-h" => {
                    args.next();
                }
                other => {
                    if let Some(name) = other.strip_prefix("--set=") {
                        variable = Some(name.to_owned());
                    } else if !other.starts_with('-') {
                        names.push(other.to_owned());
                    }
                }
            }
        }
        // `search.fs_uuid UUID VARIABLE HINTS...`; the long form has its name last, after old-style hints.
        let name = if command == "search" {
            names.pop()
        } else {
            names.first().cloned()
        };
        if command != "search" {
            variable = names.get(1).cloned().or(variable);
        }
        let Some(name) = name.filter(|n| !n.is_empty()) else {
            return Ok(false);
        };
        self.steps = self.steps.saturating_add(self.trees.len() as u64 * 20);
        let matches = |tree: &dyn FileTree| match by {
            "uuid" => tree.uuid().eq_ignore_ascii_case(&name),
            "label" => tree.label() == name,
            "file" => matches!(tree.is_dir(&normal(&name)), Ok(Some(_))),
            _ => false,
        };
        // The file system of the configuration first, so that `--file` does not wander off.
        let order = std::iter::once(self.home).chain((0..self.trees.len()).filter(|n| *n != self.home));
        let found = order
            .into_iter()
            .find(|n| self.trees.get(*n).is_some_and(|t| matches(*t)));
        let Some(found) = found else { return Ok(false) };
        if let Some(variable) = variable {
            self.set(&variable, format!("fs{found}"))?;
        }
        Ok(true)
    }
}
