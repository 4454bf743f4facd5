//! Words of GRUB's script language: quotes, escapes, variables (GRUB manual, 16.2 and 16.3).

/// A piece of a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Text. Quoted text is never a keyword, and counts as a word even when it is empty.
    Text { text: String, quoted: bool },
    /// A variable. Unquoted, its value is split at white space.
    Var { name: String, quoted: bool },
}

/// A word before its variables are replaced.
pub(crate) type Word = Vec<Piece>;

/// A token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    Word(Word),
    /// `;` or the end of a line.
    End,
    Open,
    Close,
}

/// Splits a variable's name off what follows a `$`: `${name}`, `$name`, `$1`, `$?` and the like. The name is empty
/// when there is none.
pub(crate) fn variable(after_dollar: &str) -> (&str, &str) {
    let s = after_dollar;
    if let Some(braced) = s.strip_prefix('{') {
        return match braced.find('}') {
            Some(end) => (&braced[..end], &braced[end + 1..]),
            None => ("", s),
        };
    }
    if s.starts_with(['?', '#', '@', '*']) {
        return s.split_at(1);
    }
    if s.starts_with(|c: char| c.is_ascii_digit()) {
        let end = s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
        return s.split_at(end);
    }
    let end = s
        .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .unwrap_or(s.len());
    s.split_at(end)
}

struct Lexer<'a> {
    rest: &'a str,
    line: usize,
    tokens: Vec<(Token, usize)>,
    word: Word,
    text: String,
}

/// Cuts a script into tokens, each with its line.
pub(crate) fn lex(text: &str) -> Result<Vec<(Token, usize)>, String> {
    let mut lexer = Lexer {
        rest: text,
        line: 1,
        tokens: Vec::new(),
        word: Vec::new(),
        text: String::new(),
    };
    lexer.run()?;
    Ok(lexer.tokens)
}

impl Lexer<'_> {
    fn next(&mut self) -> Option<char> {
        let c = self.rest.chars().next()?;
        self.rest = &self.rest[c.len_utf8()..];
        self.line += usize::from(c == '\n');
        Some(c)
    }

    fn flush(&mut self, quoted: bool) {
        if quoted || !self.text.is_empty() {
            self.word.push(Piece::Text {
                text: std::mem::take(&mut self.text),
                quoted,
            });
        }
    }

    fn end_word(&mut self) {
        self.flush(false);
        if self.word.is_empty() {
            return;
        }
        let word = std::mem::take(&mut self.word);
        let token = match word.as_slice() {
            [Piece::Text { text, quoted: false }] if text == "{" => Token::Open,
            [Piece::Text { text, quoted: false }] if text == "}" => Token::Close,
            _ => Token::Word(word),
        };
        self.tokens.push((token, self.line));
    }

    fn end_command(&mut self) {
        self.end_word();
        self.tokens.push((Token::End, self.line));
    }

    fn take_variable(&mut self, quoted: bool) {
        let (name, after) = variable(self.rest);
        if name.is_empty() {
            self.text.push('$');
            return;
        }
        let name = name.to_owned();
        self.rest = after;
        self.flush(quoted && !self.text.is_empty());
        self.word.push(Piece::Var { name, quoted });
    }

    fn run(&mut self) -> Result<(), String> {
        while let Some(c) = self.next() {
            match c {
                '\n' | ';' => self.end_command(),
                c if c.is_whitespace() => self.end_word(),
                '#' if self.text.is_empty() && self.word.is_empty() => {
                    while self.rest.starts_with(|c| c != '\n') {
                        self.next();
                    }
                }
                '\\' => match self.next() {
                    Some('\n') | None => {}
                    Some(c) => {
                        // An escaped character is quoted: `\{` is no brace.
                        self.flush(false);
                        self.text.push(c);
                        self.flush(true);
                    }
                },
                '\'' => {
                    self.flush(false);
                    let start = self.line;
                    loop {
                        match self.next() {
                            Some('\'') => break,
                            Some(c) => self.text.push(c),
                            None => return Err(format!("line {start}: a quote is never closed")),
                        }
                    }
                    self.flush(true);
                }
                '"' => {
                    self.flush(false);
                    self.double_quoted()?;
                }
                '$' => self.take_variable(false),
                c => self.text.push(c),
            }
        }
        self.end_command();
        Ok(())
    }

    fn double_quoted(&mut self) -> Result<(), String> {
        let start = self.line;
        loop {
            match self.next() {
                Some('"') => break,
                Some('\\') => match self.next() {
                    Some(c @ ('$' | '"' | '\\')) => self.text.push(c),
                    Some('\n') | None => {}
                    Some(c) => self.text.extend(['\\', c]),
                },
                Some('$') => self.take_variable(true),
                Some(c) => self.text.push(c),
                None => return Err(format!("line {start}: a double quote is never closed")),
            }
        }
        self.flush(true);
        Ok(())
    }
}
