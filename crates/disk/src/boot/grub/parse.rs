//! The grammar of GRUB's script language (GRUB manual, 16.4): commands and compounds.

use super::lex::{Piece, Token, Word, lex};
use std::rc::Rc;

/// Compounds inside compounds.
const DEPTH_MAX: usize = 32;

/// Commands in sequence.
pub(crate) type Block = Rc<[Stmt]>;

/// One command or compound.
#[derive(Debug)]
pub(crate) enum Stmt {
    Command(Vec<Word>),
    /// Conditions with their blocks, then the `else` block.
    If(Vec<(Block, Block)>, Block),
    /// `while`, or `until` if the flag is set.
    While {
        until: bool,
        condition: Block,
        body: Block,
    },
    For {
        name: String,
        words: Vec<Word>,
        body: Block,
    },
    Function {
        name: String,
        body: Block,
    },
    /// `menuentry`, or `submenu` if the flag is set.
    Menu {
        submenu: bool,
        words: Vec<Word>,
        body: Block,
    },
}

struct Parser {
    tokens: Vec<(Token, usize)>,
    at: usize,
}

/// Parses a script.
pub(crate) fn parse(text: &str) -> Result<Block, String> {
    let mut parser = Parser {
        tokens: lex(text)?,
        at: 0,
    };
    let (block, _) = parser.block(&[], 0)?;
    Ok(block)
}

/// The text of a word that can be a keyword.
fn keyword(token: &Token) -> Option<&str> {
    match token {
        Token::Word(word) => match word.as_slice() {
            [Piece::Text { text, quoted: false }] => Some(text),
            _ => None,
        },
        _ => None,
    }
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(t, _)| t)
    }

    fn error(&self, why: &str) -> String {
        let line = self
            .tokens
            .get(self.at)
            .or(self.tokens.last())
            .map_or(0, |(_, line)| *line);
        format!("line {line}: {why}")
    }

    /// Parses commands up to one of `ends`, which is taken and returned; up to the end of the script if there are
    /// none. `}` stands for the token.
    fn block(&mut self, ends: &[&'static str], depth: usize) -> Result<(Block, &'static str), String> {
        if depth > DEPTH_MAX {
            return Err(self.error("nested too deeply"));
        }
        let mut out = Vec::new();
        loop {
            let Some(token) = self.peek() else {
                return match ends {
                    [] => Ok((out.into(), "")),
                    _ => Err(self.error(&format!("the script ends where {} should be", ends.join(" or ")))),
                };
            };
            match token {
                Token::End => self.at += 1,
                Token::Close => {
                    self.at += 1;
                    match ends.contains(&"}") {
                        true => return Ok((out.into(), "}")),
                        false => return Err(self.error("`}` without `{`")),
                    }
                }
                Token::Open => {
                    // A bare block: its commands are simply part of this one.
                    self.at += 1;
                    let (inner, _) = self.block(&["}"], depth + 1)?;
                    let always: Block = Rc::from([]);
                    out.push(Stmt::If(vec![(always, inner)], Rc::from([])));
                }
                Token::Word(_) => {
                    let word = keyword(token).unwrap_or("").to_owned();
                    if let Some(end) = ends.iter().find(|e| **e == word) {
                        self.at += 1;
                        return Ok((out.into(), end));
                    }
                    out.push(self.statement(&word, depth)?);
                }
            }
        }
    }

    fn words(&mut self) -> Vec<Word> {
        let mut words = Vec::new();
        while let Some(Token::Word(word)) = self.peek() {
            words.push(word.clone());
            self.at += 1;
        }
        words
    }

    fn braced(&mut self, depth: usize) -> Result<Block, String> {
        while self.peek() == Some(&Token::End) {
            self.at += 1;
        }
        if self.peek() != Some(&Token::Open) {
            return Err(self.error("`{` expected"));
        }
        self.at += 1;
        Ok(self.block(&["}"], depth + 1)?.0)
    }

    fn name(&mut self) -> Result<String, String> {
        match self.peek().and_then(keyword) {
            Some(name) => {
                let name = name.to_owned();
                self.at += 1;
                Ok(name)
            }
            None => Err(self.error("a name expected")),
        }
    }

    fn statement(&mut self, word: &str, depth: usize) -> Result<Stmt, String> {
        match word {
            "if" => {
                self.at += 1;
                let mut arms = Vec::new();
                loop {
                    let (condition, _) = self.block(&["then"], depth + 1)?;
                    let (body, end) = self.block(&["elif", "else", "fi"], depth + 1)?;
                    arms.push((condition, body));
                    match end {
                        "elif" => {}
                        "else" => return Ok(Stmt::If(arms, self.block(&["fi"], depth + 1)?.0)),
                        _ => return Ok(Stmt::If(arms, Rc::from([]))),
                    }
                }
            }
            "while" | "until" => {
                self.at += 1;
                let (condition, _) = self.block(&["do"], depth + 1)?;
                let (body, _) = self.block(&["done"], depth + 1)?;
                Ok(Stmt::While {
                    until: word == "until",
                    condition,
                    body,
                })
            }
            "for" => {
                self.at += 1;
                let name = self.name()?;
                if self.name()? != "in" {
                    return Err(self.error("`in` expected"));
                }
                let words = self.words();
                let (nothing, _) = self.block(&["do"], depth + 1)?;
                if !nothing.is_empty() {
                    return Err(self.error("`do` expected"));
                }
                let (body, _) = self.block(&["done"], depth + 1)?;
                Ok(Stmt::For { name, words, body })
            }
            "function" => {
                self.at += 1;
                let name = self.name()?;
                Ok(Stmt::Function {
                    name,
                    body: self.braced(depth)?,
                })
            }
            "menuentry" | "submenu" => {
                self.at += 1;
                let words = self.words();
                // Without a block it is an ordinary command with a configuration somewhere else.
                if self.peek() != Some(&Token::Open) {
                    return Ok(Stmt::Command(words));
                }
                Ok(Stmt::Menu {
                    submenu: word == "submenu",
                    words,
                    body: self.braced(depth)?,
                })
            }
            _ => Ok(Stmt::Command(self.words())),
        }
    }
}
