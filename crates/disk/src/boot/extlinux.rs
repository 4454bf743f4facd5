//! `extlinux.conf`: the simple configuration of syslinux and U-Boot.

use super::error::BootError;
use super::tree::{FileTree, normalize};
use super::{CONFIG_MAX, Choice};

/// Labels that are read.
const LABELS_MAX: usize = 256;

#[derive(Default)]
struct Label {
    name: String,
    kernel: String,
    initrds: Vec<String>,
    append: String,
    title: String,
    is_default: bool,
}

/// Reads the configuration under `prefix` of file system number `fs`, best entry first.
pub(crate) fn choices(tree: &dyn FileTree, fs: usize, prefix: &str) -> Result<Vec<Choice>, BootError> {
    for dir in ["extlinux", "syslinux"] {
        let dir = format!("{prefix}/{dir}");
        for file in ["extlinux.conf", "syslinux.cfg"] {
            let path = format!("{dir}/{file}");
            if let Some(bytes) = tree.read(&path, CONFIG_MAX)? {
                return Ok(parse(&String::from_utf8_lossy(&bytes), &dir, &path, fs));
            }
        }
    }
    Ok(Vec::new())
}

fn parse(text: &str, dir: &str, file: &str, fs: usize) -> Vec<Choice> {
    let mut labels: Vec<Label> = Vec::new();
    let mut default = String::new();
    let mut common = String::new();
    for line in text.lines().take(100_000) {
        let line = line.trim();
        let (key, value) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let value = value.trim();
        let key = key.to_ascii_lowercase();
        if key == "label" {
            if labels.len() == LABELS_MAX {
                break;
            }
            labels.push(Label {
                name: value.to_owned(),
                ..Label::default()
            });
            continue;
        }
        match (key.as_str(), labels.last_mut()) {
            ("default" | "ontimeout", None) => default = value.to_owned(),
            ("append", None) => common = value.to_owned(),
            ("kernel" | "linux", Some(l)) => l.kernel = value.to_owned(),
            ("initrd", Some(l)) => l.initrds = value.split(',').map(|p| p.trim().to_owned()).collect(),
            ("append", Some(l)) => l.append = value.to_owned(),
            ("menu", Some(l)) => {
                let (what, rest) = value.split_once(char::is_whitespace).unwrap_or((value, ""));
                match what.to_ascii_lowercase().as_str() {
                    "label" => l.title = rest.trim().replace('^', ""),
                    "default" => l.is_default = true,
                    _ => {}
                }
            }
            _ => {}
        }
    }
    let absolute = |path: &str| {
        if path.starts_with('/') {
            normalize(path)
        } else {
            normalize(&format!("{dir}/{path}"))
        }
    };
    labels.sort_by_key(|l| !(l.name == default || (default.is_empty() && l.is_default)));
    labels
        .into_iter()
        .filter(|l| !l.kernel.is_empty())
        .map(|l| {
            // `append -` means: not even the common one. An initrd may also hide in the command line.
            let append = match l.append.as_str() {
                "-" => String::new(),
                "" => common.clone(),
                own => own.to_owned(),
            };
            let mut initrds = l.initrds;
            let mut words = Vec::new();
            for word in append.split_whitespace() {
                match word.strip_prefix("initrd=") {
                    Some(paths) => {
                        if initrds.is_empty() {
                            initrds = paths.split(',').map(str::to_owned).collect();
                        }
                    }
                    None => words.push(word),
                }
            }
            Choice {
                fs,
                kernel: absolute(&l.kernel),
                initrds: initrds
                    .iter()
                    .filter(|p| !p.is_empty())
                    .map(|p| (fs, absolute(p)))
                    .collect(),
                cmdline: words.join(" "),
                title: if l.title.is_empty() {
                    l.name.clone()
                } else {
                    l.title
                },
                origin: format!("{file}, label {:?}", l.name),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels() {
        let text = "DEFAULT b\nAPPEND quiet\nLABEL a\n KERNEL /vmlinuz-a\nLABEL b\n MENU LABEL ^Linux B\n LINUX ../vmlinuz-b\n INITRD ../ucode,../initrd-b\n APPEND root=LABEL=x ro\n\
                    LABEL c\n KERNEL k\n APPEND initrd=/i foo=1\n";
        let got = parse(text, "/boot/extlinux", "f", 3);
        assert_eq!(
            got.iter().map(|c| c.kernel.as_str()).collect::<Vec<_>>(),
            ["/boot/vmlinuz-b", "/vmlinuz-a", "/boot/extlinux/k"]
        );
        assert_eq!(got[0].title, "Linux B");
        assert_eq!(
            got[0].initrds,
            [(3, "/boot/ucode".to_owned()), (3, "/boot/initrd-b".to_owned())]
        );
        assert_eq!(got[0].cmdline, "root=LABEL=x ro");
        assert_eq!(
            (got[1].cmdline.as_str(), got[2].cmdline.as_str()),
            ("quiet", "foo=1")
        );
        assert_eq!(got[2].initrds, [(3, "/i".to_owned())]);
    }
}
