//! Takes the Markdown fence away that a model puts around a JSON object although it was asked not to, piece by piece.

/// Text that comes in pieces, without the fence around it.
#[derive(Debug, Default)]
pub(super) struct Unfenced {
    held: String,
    /// Whether it is known if there is a fence.
    begun: bool,
    fenced: bool,
}

impl Unfenced {
    /// Takes a piece, and gives what is known to be text.
    pub(super) fn piece(&mut self, piece: &str) -> String {
        self.held.push_str(piece);
        if !self.begun {
            let text = self.held.trim_start();
            if text.is_empty() || (text.len() < 3 && "```".starts_with(text)) {
                return String::new();
            }
            self.fenced = text.starts_with("```");
            if self.fenced {
                // The line with the language.
                let Some((_, rest)) = text.split_once('\n') else { return String::new() };
                self.held = rest.to_owned();
            }
            self.begun = true;
        }
        if !self.fenced {
            return std::mem::take(&mut self.held);
        }
        // What may be the fence's end is held back.
        let end = self.held.trim_end_matches(|character: char| character == '`' || character.is_whitespace()).len();
        let text = self.held[..end].to_owned();
        self.held.drain(..end);
        text
    }

    /// What was held back, when nothing more comes.
    pub(super) fn rest(&mut self) -> String {
        let rest = std::mem::take(&mut self.held);
        if self.fenced && self.begun && rest.trim() == "```" { String::new() } else { rest }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(pieces: &[&str]) -> String {
        let mut unfenced = Unfenced::default();
        let text: String = pieces.iter().map(|piece| unfenced.piece(piece)).collect();
        text + &unfenced.rest()
    }

    #[test]
    fn a_fence_goes_and_anything_else_stays() {
        assert_eq!(read(&["``", "`json\n{\"a\"", ": \"``", "`\"}\n", "``", "`\n"]), "{\"a\": \"```\"}");
        assert_eq!(read(&["{}", "\n"]), "{}\n");
        assert_eq!(read(&["`a`"]), "`a`");
        assert_eq!(read(&["``"]), "``");
        assert_eq!(read(&["```json\n{} and", " more"]), "{} and more");
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(text in "(```json\n)?[{}a` \n]{0,12}(\n```)?", at in 0..20_usize) {
            let at = text.floor_char_boundary(at.min(text.len()));
            prop_assert_eq!(read(&[&text[..at], &text[at..]]), read(&[&text]));
        }
    }
}
