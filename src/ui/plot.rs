//! Plots: drawn here, so that they have the page's colours, by day and by night. Each has its numbers in a table below.

use maud::{Markup, html};

/// Units of the drawing; it is scaled to its place.
const WIDTH: f64 = 540.0;
const HEIGHT: f64 = 180.0;
const LEFT: f64 = 58.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 156.0;
/// Colours that can be told apart; what is more shares the last.
pub(super) const COLOURS: usize = 8;

/// One of the things that are drawn.
pub(super) struct Series {
    /// What it is.
    pub(super) name: String,
    /// Its value in each slice; `None` where there is none.
    pub(super) values: Vec<Option<f64>>,
}

/// What is drawn.
pub(super) struct Plot<'a> {
    /// The page's own name for it.
    pub(super) id: &'a str,
    /// What it shows.
    pub(super) title: &'a str,
    /// What each slice of time is called.
    pub(super) slices: &'a [String],
    /// At most [`COLOURS`] of them.
    pub(super) series: &'a [Series],
    /// How a value is said.
    pub(super) say: fn(f64) -> String,
    /// Whether the series are parts of a whole, and stand on each other.
    pub(super) stacked: bool,
}

#[expect(clippy::cast_precision_loss, reason = "a few hundred slices")]
fn place(at: usize, of: usize) -> f64 {
    (WIDTH - LEFT) / of.max(1) as f64 * at as f64 + LEFT
}

/// The next number that is 1, 2 or 5 and zeros.
fn nice(most: f64) -> f64 {
    let power = 10_f64.powf(most.max(f64::MIN_POSITIVE).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|step| step * power).find(|nice| *nice >= most * 0.999_999).unwrap_or(10.0 * power)
}

fn rounded(number: f64) -> String {
    format!("{number:.1}")
}

impl Plot<'_> {
    fn most(&self) -> f64 {
        let sum = |slice: usize| {
            let values = self.series.iter().filter_map(|series| series.values[slice]);
            if self.stacked { values.sum() } else { values.fold(0.0, f64::max) }
        };
        (0..self.slices.len()).map(sum).fold(0.0, f64::max)
    }

    /// The figure, with a legend and the numbers.
    pub(super) fn draw(&self) -> Markup {
        let most = self.most();
        let nothing = most <= 0.0;
        let top = if nothing { 1.0 } else { nice(most) };
        let y = |value: f64| BOTTOM - value / top * (BOTTOM - TOP);
        let title = format!("{}-title", self.id);
        html! {
            figure.plot {
                figcaption id=(title) { (self.title) }
                @if nothing { p.hint { "Nothing in this time." } } @else {
                    (self.legend())
                    div.scroll tabindex="0" role="group" aria-labelledby=(title) {
                        svg viewBox=(format!("0 0 {WIDTH} {HEIGHT}")) role="img" aria-labelledby=(title) {
                            @for part in [0.0, 0.5, 1.0] {
                                line.grid x1=(LEFT) x2=(WIDTH) y1=(rounded(y(top * part))) y2=(rounded(y(top * part))) {}
                                text.scale x=(LEFT - 6.0) y=(rounded(y(top * part) + 4.0)) text-anchor="end" { ((self.say)(top * part)) }
                            }
                            (self.times())
                            @if self.stacked { (self.bars(y)) } @else { (self.lines(y)) }
                        }
                    }
                    (self.numbers())
                }
            }
        }
    }

    fn legend(&self) -> Markup {
        html! {
            ul.legend {
                @for (colour, series) in self.series.iter().enumerate() { li { span class={ "key c" (colour) } {} (series.name) } }
            }
        }
    }

    /// What some of the slices are called, below them.
    fn times(&self) -> Markup {
        let every = self.slices.len().div_ceil(5).max(1);
        let last = |at: usize| at + every > self.slices.len() && at > 0;
        html! {
            @for (at, name) in self.slices.iter().enumerate().step_by(every).filter(|(at, _)| !last(*at) || at + every / 2 < self.slices.len()) {
                text.scale x=(rounded(place(at, self.slices.len()))) y=(HEIGHT - 6.0) { (name.get(5..).unwrap_or(name)) }
            }
        }
    }

    fn bars(&self, y: impl Fn(f64) -> f64) -> Markup {
        let width = place(1, self.slices.len()) - place(0, self.slices.len());
        let mut bars = Vec::new();
        for (at, name) in self.slices.iter().enumerate() {
            let mut below = 0.0;
            for (colour, series) in self.series.iter().enumerate() {
                let value = series.values[at].unwrap_or_default();
                if value > 0.0 {
                    bars.push((
                        colour,
                        at,
                        y(below + value),
                        y(below) - y(below + value),
                        format!("{name}, {}: {}", series.name, (self.say)(value)),
                    ));
                    below += value;
                }
            }
        }
        html! {
            @for (colour, at, top, height, says) in bars {
                rect class={ "c" (colour) } x=(rounded(place(at, self.slices.len()) + width * 0.1)) y=(rounded(top)) width=(rounded(width * 0.8)) height=(rounded(height)) {
                    title { (says) }
                }
            }
        }
    }

    fn lines(&self, y: impl Fn(f64) -> f64) -> Markup {
        let half = (place(1, self.slices.len()) - place(0, self.slices.len())) / 2.0;
        html! {
            @for (colour, series) in self.series.iter().enumerate() {
                @let points: Vec<_> = series.values.iter().enumerate().filter_map(|(at, value)| Some((at, (*value)?))).collect();
                polyline class={ "c" (colour) } points=(points.iter().map(|(at, value)| format!("{:.1},{:.1} ", place(*at, self.slices.len()) + half, y(*value))).collect::<String>()) {}
                @for (at, value) in &points {
                    circle class={ "c" (colour) } cx=(rounded(place(*at, self.slices.len()) + half)) cy=(rounded(y(*value))) r="3" {
                        title { (self.slices[*at]) ", " (series.name) ": " ((self.say)(*value)) }
                    }
                }
            }
        }
    }

    /// The numbers, newest first, those slices left out in which there is nothing.
    fn numbers(&self) -> Markup {
        let something = |at: &usize| self.series.iter().any(|series| series.values[*at].is_some_and(|value| value > 0.0));
        html! {
            details {
                summary { "The numbers" }
                div.scroll tabindex="0" role="group" aria-label={ (self.title) ", numbers" } {
                    table {
                        thead { tr { th scope="col" { "Time" } @for series in self.series { th.number scope="col" { (series.name) } } } }
                        tbody {
                            @for at in (0..self.slices.len()).rev().filter(something) {
                                tr {
                                    th scope="row" { (self.slices[at]) }
                                    @for series in self.series { td.number { @match series.values[at] { Some(value) => ((self.say)(value)), None => "–" } } }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_ends_at_a_round_number() {
        for (most, top) in [(0.03, 0.05), (1.0, 1.0), (1.1, 2.0), (42.0, 50.0), (99.0, 100.0), (1234.0, 2000.0)] {
            assert!((nice(most) - top).abs() < 1e-9, "{most}: {}", nice(most));
        }
    }

    #[test]
    fn bars_stand_on_each_other_and_names_are_text() {
        let series = [("<b>", [1.0, 0.0]), ("b", [2.0, 1.0])]
            .map(|(name, values)| Series { name: name.to_owned(), values: values.map(Some).to_vec() });
        let slices = ["2026-11-26".to_owned(), "2026-11-27".to_owned()];
        let plot = Plot { id: "jobs", title: "Runs", slices: &slices, series: &series, say: |value| format!("{value:.0}"), stacked: true };
        assert!((plot.most() - 3.0).abs() < 1e-9);
        let drawn = plot.draw().into_string();
        assert_eq!(drawn.matches("<rect").count(), 3);
        assert!(drawn.contains("2026-11-26, &lt;b&gt;: 1") && !drawn.contains("<b>"), "{drawn}");
        let empty = [Series { name: "a".to_owned(), values: vec![None, Some(0.0)] }];
        assert!(Plot { series: &empty, ..plot }.draw().into_string().contains("Nothing in this time"));
    }
}
